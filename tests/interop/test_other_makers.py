"""Our Noise and Yamux beside other makers': js-libp2p, and py-libp2p with nothing of ours."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.host.ping import PingService
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.mesh import Mesh
from pinaivu_node.protocol.ids import PeerId, Topic

ECHO = "/interop/echo/1"
TOPIC = Topic("/pinaivu/interop/1")
MEBIBYTE = 1 << 20

pytestmark = pytest.mark.timeout(120)


async def echo(stream) -> None:
    """Bytes, not frames: as any libp2p handler would."""
    try:
        while data := await stream.read(65536):
            await stream.write(data)
    except StreamEOF:
        pass
    await stream.close()


@asynccontextmanager
async def our_mesh() -> AsyncIterator[Mesh]:
    async with open_libp2p_mesh(MeshConfig(), seed=os.urandom(32)) as mesh:
        mesh._host.set_stream_handler(ECHO, echo)
        yield mesh


@asynccontextmanager
async def connected(start_other, *, we_dial: bool):
    async with our_mesh() as mesh, start_other() as other:
        peer = PeerId(other.address.rpartition("/p2p/")[2])
        with trio.fail_after(20):
            if we_dial:
                assert await mesh.dial(other.address) == peer
            else:
                assert (await other.do("dial", address=mesh.addresses[0]))["dialled"]
            async with mesh.watch_peers() as events:
                await anext(events)
        yield mesh, other, peer


@pytest.fixture(params=["we dial", "they dial"])
async def pair(request, start_other):
    async with connected(start_other, we_dial=request.param == "we dial") as pair:
        yield pair


async def echoed_by(mesh: Mesh, peer: PeerId, data: bytes) -> bytes:
    stream = await mesh._host.new_stream(ID.from_string(peer), [ECHO])
    back = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, data)
        while len(back) < len(data):
            back += await stream.read(65536)
    await stream.close()
    with pytest.raises(StreamEOF):
        await stream.read(1)
    return bytes(back)


def protocols_known(mesh: Mesh, peer: PeerId) -> list[str]:
    try:
        return mesh._host.get_peerstore().get_protocols(ID.from_string(peer))
    except PeerStoreError:  # of whom nothing is known yet
        return []


async def test_each_learns_what_the_other_speaks(pair):
    mesh, other, peer = pair
    with trio.fail_after(20):
        while ECHO not in (await other.do("identify"))["protocols"]:  # noqa: ASYNC110 - another's
            await trio.sleep(0.05)
        while ECHO not in protocols_known(mesh, peer):  # noqa: ASYNC110 - libp2p's
            await trio.sleep(0.05)


async def test_pings_come_back_both_ways(pair):
    mesh, other, peer = pair
    with trio.fail_after(20):
        assert (await other.do("ping"))["milliseconds"] >= 0
        assert await PingService(mesh._host).ping(ID.from_string(peer), 3)


@pytest.mark.parametrize("size", [1, 65_536, 2 * MEBIBYTE])
async def test_bytes_come_back_as_they_went(pair, size):
    mesh, other, peer = pair
    with trio.fail_after(60):
        data = os.urandom(size)
        assert await echoed_by(mesh, peer, data) == data
        answer = await other.do("echo", size=size)
        assert answer["echoed"] == size
        assert answer["same"]


async def test_gossip_is_heard_both_ways(pair):
    mesh, other, peer = pair
    with trio.fail_after(30):
        async with mesh.subscribe(TOPIC) as inbox, trio.open_nursery() as nursery:

            async def talk() -> None:
                for number in itertools.count():
                    await mesh.publish(TOPIC, b"ours %d" % number)
                    await other.do("publish", text=f"theirs {number}")
                    await trio.sleep(0.1)

            nursery.start_soon(talk)
            delivery = await anext(inbox)
            assert delivery.publisher == peer
            assert delivery.payload.startswith(b"theirs")
            await other.has_heard(lambda text: text.startswith("ours"))
            nursery.cancel_scope.cancel()


@pytest.mark.live
@pytest.mark.timeout(200)
async def test_a_minute_of_everything_at_once_loses_nothing(start_js, start_py):
    """With all makers and both ways of dialling, side by side."""
    async with trio.open_nursery() as nursery:
        for start_other in (start_js, start_py):
            for we_dial in (True, False):
                nursery.start_soon(soak, start_other, we_dial)


async def soak(start_other, we_dial) -> None:
    """Echoes of all sizes both ways, gossip and keep-alive, on the one connection."""
    async with connected(start_other, we_dial=we_dial) as (mesh, other, peer):
        counts = {"ours": 0, "theirs": 0, "heard": 0}
        (connection,) = mesh._connections

        async def our_echoes(number: int) -> None:
            for turn in itertools.count():
                data = os.urandom(1 + (turn * 7919 * (number + 1)) % 200_000)
                assert await echoed_by(mesh, peer, data) == data
                counts["ours"] += 1

        async def their_echoes() -> None:
            for turn in itertools.count():
                answer = await other.do("echo", size=1 + (turn * 6007) % 300_000)
                assert answer["same"]
                counts["theirs"] += 1

        async def gossip() -> None:
            for turn in itertools.count():
                await mesh.publish(TOPIC, b"ours %d" % turn)
                await other.has_heard(lambda text, wanted=f"ours {turn}": text == wanted)
                counts["heard"] += 1
                await trio.sleep(0.2)

        async with mesh.subscribe(TOPIC):
            await trio.sleep(3)  # until the meshes of both have formed
            with trio.move_on_after(60):
                async with trio.open_nursery() as nursery:
                    for number in range(4):
                        nursery.start_soon(our_echoes, number)
                    nursery.start_soon(their_echoes)
                    nursery.start_soon(gossip)
        assert set(mesh._connections) == {connection}
        assert min(counts.values()) > 50, counts
