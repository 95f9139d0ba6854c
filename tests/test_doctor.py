"""What a provider is told of its ways to others."""

from __future__ import annotations

import pytest
import trio.testing

from pinaivu_node.doctor import advice, diagnose, probe
from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.memory import MemoryNetwork
from pinaivu_node.mesh.mesh import Link, Path
from pinaivu_node.protocol.ids import PeerId

HOME, GATEWAY = PeerId("home"), PeerId("gateway")


def link(peer: PeerId, path: Path, *, dialled: bool = True) -> Link:
    return Link(peer=peer, path=path, remote="x:1", dialled=dialled, round_trip_ms=None)


@pytest.mark.parametrize(
    ("home", "others", "words"),
    [
        ([], [], "cannot be reached: check --coordinator"),
        ([link(HOME, Path.WEBSOCKET)], [], "reached by WebSocket"),
        ([link(HOME, Path.DIRECT)], [], "No gateway is connected"),
        ([link(HOME, Path.DIRECT)], [link(GATEWAY, Path.RELAYED)], "through a relay only"),
        ([link(HOME, Path.DIRECT)], [link(GATEWAY, Path.DIRECT)], "All is well"),
        (
            [link(HOME, Path.DIRECT)],
            [link(GATEWAY, Path.DIRECT), link(GATEWAY, Path.RELAYED)],
            "All is well",
        ),
        ([link(HOME, Path.DIRECT)], [link(GATEWAY, Path.DIRECT)], "need no open port"),
        (
            [link(HOME, Path.DIRECT)],
            [link(GATEWAY, Path.DIRECT, dialled=False)],
            "Others can dial us",
        ),
    ],
    ids=[
        "nobody", "websocket", "no-gateway", "relayed", "direct", "both", "outbound", "inbound",
    ],
)  # fmt: skip
def test_each_way_has_its_advice(home, others, words) -> None:
    assert words in " ".join(advice(home, others))


async def test_each_link_is_told(autojump_clock: trio.testing.MockClock) -> None:
    async with (
        MemoryNetwork() as network,
        network.join(b"1" * 32) as one,
        network.join(b"2" * 32) as two,
    ):
        assert diagnose(one, two.peer_id)["coordinator"] == "not connected"
        await one.dial(two.addresses[0])
        told = diagnose(one, two.peer_id)
        assert told["coordinator"][0]["path"] == "direct"
        assert told["gateways"] == []
        assert told["addresses"] == list(one.addresses)


async def test_addresses_are_tried_one_by_one() -> None:
    async with open_libp2p_mesh(MeshConfig(), seed=b"1" * 32) as mesh:
        nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{mesh.peer_id}"
        found, lost, misspelt = await probe((mesh.addresses[0], nobody, "example.org:4001"))
    assert found["reached"]
    assert found["connected_in_ms"] > 0
    assert "cannot reach" in lost["reason"]
    assert "not a multiaddr" in misspelt["reason"]
