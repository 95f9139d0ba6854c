"""The relay's part, under a virtual clock: what it lets pass, and for how long it waits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from pinaivu_node.mesh.memory import MemoryNetwork
from pinaivu_node.mesh.mesh import FrameStream, Mesh, MeshError, PeerUnreachable, StreamLost
from pinaivu_node.mesh.pipes import RelayLimits
from pinaivu_node.mesh.relay import Relay, reach
from pinaivu_node.protocol.ids import PeerId
from pinaivu_node.protocol.relay import Reach, Reached
from pinaivu_node.protocol.topics import RELAY
from pinaivu_node.protocol.wire import encode

RELAY_SEED, ONE, OTHER = (bytes([number]) * 32 for number in range(3))


async def echo(stream: FrameStream) -> None:
    while True:
        await stream.send(await stream.receive())


async def send_for_ever(stream: FrameStream) -> None:
    while True:
        await stream.send(b"x" * 60_000)


@asynccontextmanager
async def memory_relay(limits: RelayLimits) -> AsyncIterator[tuple[Mesh, Mesh, Relay]]:
    async with (
        MemoryNetwork(seed=1, latency=0.01) as network,
        network.join(RELAY_SEED) as mesh,
        network.join(ONE) as one,
        network.join(OTHER) as other,
    ):

        async def accept(stream: FrameStream, source: PeerId) -> None:
            assert source == one.peer_id
            await echo(stream)

        relay = Relay(mesh.open, accept, limits=limits, relays=frozenset())
        target = Relay(other.open, accept, limits=None, relays=frozenset({mesh.peer_id}))
        mesh.handle(RELAY, relay.serve)
        other.handle(RELAY, target.serve)
        for peer in (one, other):
            await peer.dial(mesh.addresses[0])
        yield one, other, relay


async def reached(one: Mesh, other: Mesh) -> FrameStream:
    (relay,) = one.peers()
    stream = await one.open(relay, RELAY)
    await reach(stream, other.peer_id)
    return stream


async def test_a_pipe_carries_no_more_than_it_may(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_relay(RelayLimits(bytes_per_pipe=100)) as (one, other, relay):
        stream = await reached(one, other)
        await stream.send(b"x" * 50)
        assert await stream.receive() == b"x" * 50
        await stream.send(b"x")
        with pytest.raises(MeshError):
            await stream.receive()
        assert not len(relay.book)


async def test_a_sender_is_slowed_down(autojump_clock: trio.testing.MockClock) -> None:
    limits = RelayLimits(bytes_per_second=1000, burst=1000)
    async with memory_relay(limits) as (one, other, _):
        stream = await reached(one, other)
        start = trio.current_time()
        for _ in range(10):
            await stream.send(b"x" * 500)
            await stream.receive()
        assert 3.5 < trio.current_time() - start < 5


async def test_a_pipe_does_not_live_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_relay(RelayLimits(seconds_per_pipe=5)) as (one, other, _):
        stream = await reached(one, other)
        start = trio.current_time()
        with pytest.raises(MeshError):
            await stream.receive()
        assert 4.9 < trio.current_time() - start < 5.2


async def test_a_chunk_that_is_too_long_ends_the_pipe(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with memory_relay(RelayLimits()) as (one, other, _):
        stream = await reached(one, other)
        await stream.send(b"x" * 65_537)
        with pytest.raises(MeshError):
            await stream.receive()


async def test_a_target_that_does_not_read_loses_its_pipe_and_nothing_else(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with memory_relay(RelayLimits()) as (one, other, relay):

        async def take_nothing(stream: FrameStream) -> None:
            await stream.receive()
            await stream.send(encode(Reached()))
            await trio.sleep_forever()

        other.handle(RELAY, take_nothing)
        stream = await reached(one, other)
        with pytest.raises(StreamLost), trio.fail_after(30):
            await send_for_ever(stream)
        assert not len(relay.book)
        assert one.peers()
        assert other.peers()


async def test_one_who_says_nothing_is_waited_for_no_longer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with memory_relay(RelayLimits()) as (one, other, _):

        async def say_nothing(stream: FrameStream) -> None:
            await trio.sleep_forever()

        other.handle(RELAY, say_nothing)
        with pytest.raises(PeerUnreachable), trio.fail_after(10):
            await reached(one, other)
        (relay,) = one.peers()
        silent = await one.open(relay, RELAY)
        with pytest.raises(MeshError), trio.fail_after(10):
            await silent.receive()


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 9, encode(Reached())], ids=["0", "9", "else"])
async def test_garbage_costs_the_relay_nothing(
    garbage: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async with memory_relay(RelayLimits()) as (one, other, relay):
        (peer,) = one.peers()
        stream = await one.open(peer, RELAY)
        await stream.send(garbage)
        with pytest.raises(MeshError):
            await stream.receive()
        assert relay.book.pipes_made == 0
        stranger = Reach(target=PeerId("12D3KooWRdFFg3yTbTsDq5Z1yCvCWbqznEFro9jeVivo7rkayJ4D"))
        stream = await other.open(peer, RELAY)
        with pytest.raises(PeerUnreachable, match="not connected here"):
            await reach(stream, stranger.target)
