"""The addresses that are told of a peer that listens everywhere."""

from __future__ import annotations

import ifaddr
import pytest

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.libp2p.listening import spelled_out


def adapters(*ips: str) -> list[ifaddr.Adapter]:
    return [
        ifaddr.Adapter(
            name, name, [ifaddr.IP((ip, 0, 0) if ":" in ip else ip, 24, name)], index=number
        )
        for number, ip in enumerate(ips)
        for name in (f"eth{number}",)
    ]


@pytest.mark.parametrize(
    ("ips", "address", "told"),
    [
        (["127.0.0.1", "192.0.2.2"], "/ip4/0.0.0.0/tcp/1", ["/ip4/192.0.2.2/tcp/1"]),
        (["127.0.0.1", "::1"], "/ip4/0.0.0.0/tcp/1/ws", ["/ip4/127.0.0.1/tcp/1/ws"]),
        (["::1", "fe80::1", "2001:db8::2"], "/ip6/::/tcp/1", ["/ip6/2001:db8::2/tcp/1"]),
        (["127.0.0.1"], "/ip6/::/tcp/1", ["/ip6/::/tcp/1"]),
        (["192.0.2.2"], "/ip4/127.0.0.1/tcp/1", ["/ip4/127.0.0.1/tcp/1"]),
    ],
    ids=["outward", "alone", "six", "none", "named"],
)
def test_a_wildcard_is_spelled_out(monkeypatch, ips, address, told) -> None:
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: adapters(*ips))
    assert spelled_out(address) == told


def test_a_machine_with_many_interfaces_names_a_few(monkeypatch) -> None:
    many = adapters(*(f"192.0.2.{number}" for number in range(1, 20)))
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: many)
    assert len(spelled_out("/ip4/0.0.0.0/tcp/1")) == 4


async def test_nobody_is_sent_to_himself() -> None:
    config = MeshConfig(listen=("/ip4/0.0.0.0/tcp/0",))
    async with (
        open_libp2p_mesh(config, seed=b"1" * 32) as one,
        open_libp2p_mesh(MeshConfig(listen=()), seed=b"2" * 32) as other,
    ):
        assert "0.0.0.0" not in one.addresses[0]
        assert await other.dial(one.addresses[0]) == one.peer_id
