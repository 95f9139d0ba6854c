"""Reaching a peer through a relay, on real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from pinaivu_node.mesh import redial
from pinaivu_node.mesh.address import is_circuit, split_circuit
from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.mesh import FrameStream, Mesh, MeshError, Path, PeerUnreachable
from pinaivu_node.mesh.pipes import RelayLimits
from pinaivu_node.mesh.relay import Relay
from pinaivu_node.protocol.ids import PeerId
from pinaivu_node.protocol.relay import Incoming, Reached
from pinaivu_node.protocol.topics import RELAY
from pinaivu_node.protocol.wire import encode

RELAY_SEED, ONE, OTHER, THIRD = (bytes([number]) * 32 for number in range(4))


async def echo(stream: FrameStream) -> None:
    while True:
        await stream.send(await stream.receive())


@dataclass
class Town:
    relay: Mesh
    one: Mesh
    other: Mesh


@asynccontextmanager
async def hidden_pair(
    limits: RelayLimits | None = None, *, other: MeshConfig | None = None
) -> AsyncIterator[Town]:
    """Two peers that listen nowhere, connected to one relay."""
    async with open_libp2p_mesh(
        MeshConfig(relay=limits or RelayLimits()), seed=RELAY_SEED
    ) as relay:
        hidden = MeshConfig(listen=(), relays=(f"/p2p/{relay.peer_id}",), detour_quiet=0.1)
        async with (
            open_libp2p_mesh(hidden, seed=ONE) as one,
            open_libp2p_mesh(other or hidden, seed=OTHER) as second,
        ):
            for mesh in (one, second):
                mesh.handle("/echo/1", echo)
                await mesh.dial(relay.addresses[0])
            yield Town(relay, one, second)


async def until(holds: Callable[[], object]) -> None:
    with trio.fail_after(5):
        while not holds():  # noqa: ASYNC110 - nobody tells of it
            await trio.sleep(0.01)


async def says_back(mesh: Mesh, peer: PeerId, frame: bytes) -> bool:
    stream = await mesh.open(peer, "/echo/1")
    await stream.send(frame)
    return await stream.receive() == frame


async def test_two_hidden_peers_reach_each_other() -> None:
    async with hidden_pair() as town:
        assert await town.one.dial(town.other.addresses[0]) == town.other.peer_id
        assert await says_back(town.one, town.other.peer_id, b"x" * 1_000_000)
        assert await says_back(town.other, town.one.peer_id, b"back")
        paths = {link.peer: link.path for link in town.other.links()}
        assert paths == {town.relay.peer_id: Path.DIRECT, town.one.peer_id: Path.RELAYED}
        counted = town.relay.statistics()
        assert (counted.pipes, counted.pipes_made) == (1, 1)
        assert counted.pipe_bytes > 2_000_000


async def test_the_relay_sees_no_word_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = bytearray()
    pass_on = Relay._join

    async def overheard(self, stream, pipe, book):
        receive = stream.receive

        async def listen() -> bytes:
            chunk: bytes = await receive()
            seen.extend(chunk)
            return chunk

        stream.receive = listen
        await pass_on(self, stream, pipe, book)

    monkeypatch.setattr(Relay, "_join", overheard)
    async with hidden_pair() as town:
        await town.one.dial(town.other.addresses[0])
        assert await says_back(town.one, town.other.peer_id, b"a secret" * 100)
    assert len(seen) > 800
    assert b"secret" not in seen
    assert b"/echo/1" not in seen


async def test_the_pipe_ends_with_its_connection() -> None:
    async with hidden_pair() as town:
        await town.one.dial(town.other.addresses[0])
        await town.one.disconnect(town.other.peer_id)
        await until(lambda: not (town.relay.statistics().pipes))
        assert town.one.peers() == {town.relay.peer_id}


async def test_the_relays_end_is_noticed_by_both() -> None:
    async with hidden_pair() as town:
        await town.one.dial(town.other.addresses[0])
        await town.relay.close()
        await until(lambda: not (town.one.peers() or town.other.peers()))


async def test_a_relay_says_why_not() -> None:
    async with hidden_pair(RelayLimits(pipes=1)) as town:
        await town.one.dial(town.other.addresses[0])
        async with open_libp2p_mesh(MeshConfig(listen=()), seed=THIRD) as third:
            with pytest.raises(PeerUnreachable, match="not connected"):
                await third.dial(town.one.addresses[0])
            await third.dial(town.relay.addresses[0])
            with pytest.raises(PeerUnreachable, match="all 1 pipes are taken"):
                await third.dial(town.one.addresses[0])


async def test_a_peer_that_is_no_relay_passes_nothing_on() -> None:
    async with hidden_pair() as town, open_libp2p_mesh(MeshConfig(), seed=THIRD) as third:
        await town.one.dial(third.addresses[0])
        through = f"{third.addresses[0]}/p2p-circuit/p2p/{town.other.peer_id}"
        with pytest.raises(PeerUnreachable, match="no relay"):
            await town.one.dial(through)


async def test_pipes_are_taken_from_our_relays_alone() -> None:
    open_to_nobody = MeshConfig(listen=())
    async with hidden_pair(other=open_to_nobody) as town:
        through = f"/p2p/{town.relay.peer_id}/p2p-circuit/p2p/{town.other.peer_id}"
        with pytest.raises(PeerUnreachable, match="no relay of ours"):
            await town.one.dial(through)


async def test_a_relay_cannot_pass_itself_off_as_another() -> None:
    async with hidden_pair() as town:
        imposter = f"/p2p/{town.relay.peer_id}/p2p-circuit/p2p/{town.other.peer_id}"

        async def lie(stream: FrameStream) -> None:
            await stream.receive()
            onward = await town.relay.open(town.one.peer_id, RELAY)
            await onward.send(encode(Incoming(source=town.other.peer_id)))
            await onward.receive()
            await stream.send(encode(Reached()))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, stream, onward)
                nursery.start_soon(copy, onward, stream)

        town.relay.handle(RELAY, lie)
        with pytest.raises(PeerUnreachable):  # it is led to itself, and nobody else proves a name
            await town.one.dial(imposter)
        assert town.other.peer_id not in town.one.peers()


@pytest.mark.parametrize(
    "chunk",
    [b"", b"\xff" * 100, b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\0\x20" + b"x" * 32],
    ids=["nothing", "garbage", "bad-noise"],
)
async def test_garbage_in_a_pipe_harms_nobody(chunk: bytes) -> None:
    async with hidden_pair() as town:
        stream = await town.relay.open(town.one.peer_id, RELAY)
        await stream.send(encode(Incoming(source=town.other.peer_id)))
        await stream.receive()
        await stream.send(chunk)
        await stream.end()
        with pytest.raises(MeshError), trio.fail_after(8):
            await receive_for_ever(stream)
        assert town.one.peers() == {town.relay.peer_id}
        assert await town.other.dial(town.one.addresses[0]) == town.one.peer_id


async def receive_for_ever(stream: FrameStream) -> None:
    while True:
        await stream.receive()


async def copy(source: FrameStream, sink: FrameStream) -> None:
    while True:
        await sink.send(await source.receive())


async def test_a_relay_with_an_address_is_dialled_and_kept() -> None:
    async with open_libp2p_mesh(MeshConfig(relay=RelayLimits()), seed=RELAY_SEED) as relay:
        config = MeshConfig(listen=(), relays=(relay.addresses[0],))
        async with (
            open_libp2p_mesh(config, seed=ONE) as one,
            open_libp2p_mesh(MeshConfig(listen=()), seed=OTHER) as other,
        ):
            await until(one.peers)
            assert one.addresses[0].startswith("/ip4/")
            assert await other.dial(one.addresses[0]) == one.peer_id


async def test_a_direct_way_takes_the_place_of_a_relayed_one_when_it_is_quiet() -> None:
    hidden_but_listening = MeshConfig(detour_quiet=0.1)
    async with hidden_pair(other=hidden_but_listening) as town:
        await town.other.dial(town.one.addresses[0])
        stream = await town.one.open(town.other.peer_id, "/echo/1")
        await town.one.dial(town.other.addresses[0])
        with trio.move_on_after(0.5):
            while True:  # as long as it is used, it stays
                await stream.send(b"x")
                await stream.receive()
                await trio.sleep(0.01)
        assert {link.path for link in links_to(town.other.peer_id, town.one)} == set(Path) - {
            Path.WEBSOCKET
        }
        await until(lambda: len(links_to(town.other.peer_id, town.one)) == 1)
        assert links_to(town.other.peer_id, town.one)[0].path is Path.DIRECT
        assert await says_back(town.one, town.other.peer_id, b"still there")


async def test_of_two_pipes_between_two_peers_one_is_given_up() -> None:
    async with hidden_pair() as town:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(town.one.dial, town.other.addresses[0])
            nursery.start_soon(town.other.dial, town.one.addresses[0])
        assert town.relay.statistics().pipes_made == 2
        await until(lambda: town.relay.statistics().pipes == 1)
        assert await says_back(town.one, town.other.peer_id, b"still there")
        assert await says_back(town.other, town.one.peer_id, b"still there")
        assert town.relay.statistics().pipes == 1


def links_to(peer: PeerId, mesh: Mesh):
    return [link for link in mesh.links() if link.peer == peer]


async def test_a_kept_peer_is_dialled_directly_first() -> None:
    both = MeshConfig(relays=("/p2p/12D3KooWRdFFg3yTbTsDq5Z1yCvCWbqznEFro9jeVivo7rkayJ4D",))
    async with hidden_pair(other=both) as town:
        for address in reversed(town.other.addresses):
            town.one.keep(address)
        await until(lambda: town.other.peer_id in town.one.peers())
        assert links_to(town.other.peer_id, town.one)[0].path is Path.DIRECT


async def test_a_kept_peer_is_reached_through_the_relay_if_there_is_no_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redial, "_HEAD_START", 0.1)
    async with hidden_pair() as town:
        town.one.keep(f"/ip4/127.0.0.1/tcp/1/p2p/{town.other.peer_id}")
        town.one.keep(town.other.addresses[0])
        await until(lambda: town.other.peer_id in town.one.peers())
        assert links_to(town.other.peer_id, town.one)[0].path is Path.RELAYED


async def test_the_ways_through_relays_are_not_cut_off() -> None:
    relays = ("/p2p/12D3KooWRdFFg3yTbTsDq5Z1yCvCWbqznEFro9jeVivo7rkayJ4D",)
    announce = tuple(f"/ip4/192.0.2.{number}/tcp/1" for number in range(1, 11))
    config = MeshConfig(announce=announce, relays=relays)
    async with open_libp2p_mesh(config, seed=ONE) as mesh:
        assert len(mesh.addresses) == 8
        assert is_circuit(mesh.addresses[-1])


def test_nothing_leads_through_two_relays() -> None:
    peer = "12D3KooWRdFFg3yTbTsDq5Z1yCvCWbqznEFro9jeVivo7rkayJ4D"
    assert is_circuit(f"/p2p/{peer}/p2p-circuit")
    assert split_circuit(f"/p2p/{peer}/p2p-circuit") == (None, peer)
    address = f"/ip4/203.0.113.7/tcp/1/p2p/{peer}"
    assert split_circuit(f"{address}/p2p-circuit") == (address, peer)
    for bad in (
        f"/p2p/{peer}/p2p-circuit/p2p/{peer}/p2p-circuit",
        "/p2p/nobody/p2p-circuit",
        "/p2p-circuit",
    ):
        with pytest.raises(PeerUnreachable):
            split_circuit(bad)
