"""The muxer on trio: on real sockets, and on a layered connection under a virtual clock."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.lowlevel
import trio.testing
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_keys
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)

from pinaivu_node.mesh.libp2p.channel import LayeredChannel, SocketChannel
from pinaivu_node.mesh.libp2p.muxed_stream import HIGH_WATER
from pinaivu_node.mesh.libp2p.pressure import Pressure
from pinaivu_node.mesh.libp2p.pulse import Pulse
from pinaivu_node.mesh.libp2p.secure import GatedNoise, NoiseOnly, NotSpoken, proposal
from pinaivu_node.mesh.libp2p.transport import YamuxOnly
from pinaivu_node.mesh.yamux.connection import Limits
from pinaivu_node.mesh.yamux.frames import INITIAL_WINDOW

pytestmark = pytest.mark.timeout(30)


class Layer:
    """A stream as other transports of libp2p are: no socket to be found in it."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        return await self._stream.receive_some(n)

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> None:
        return None


class Side:
    def __init__(self, name: str, limits: Limits, *, max_held: int = 64 << 20) -> None:
        self.keys = create_new_key_pair(seed=name.encode().ljust(32))
        self.peer_id = ID.from_pubkey(self.keys.public_key)
        noise = GatedNoise(self.keys, noise_privkey=create_noise_keys().private_key)
        noise.gate = lambda _peer: True
        self.security = NoiseOnly(noise, timeout=5)
        self.pulse = Pulse(ping_interval=1.0, dead_after=3.5)
        self.faults: list[str] = []
        self.muxer = YamuxOnly(limits, self.pulse, Pressure(max_held), self.note, timeout=5)
        self.connection = None

    def note(self, _peer: object, reason: str, _offence: object) -> None:
        self.faults.append(reason)

    async def listen(self, raw, nursery) -> None:
        session = await self.security.secure_inbound(raw)
        await self.start(session, session.get_remote_peer(), nursery)

    async def dial(self, raw, peer_id, nursery) -> None:
        session = await self.security.secure_outbound(raw, peer_id)
        await self.start(session, peer_id, nursery)

    async def start(self, session, peer_id, nursery) -> None:
        self.connection = await self.muxer.new_conn(session, peer_id)
        nursery.start_soon(self.connection.start)
        nursery.start_soon(self.pulse.run)
        await self.connection.event_started.wait()


async def socket_pair():
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    dialled = await trio.testing.open_stream_to_socket_listener(listener)
    accepted = await listener.accept()
    await listener.aclose()
    return TrioTCPStream(dialled), TrioTCPStream(accepted)


async def layer_pair():
    one, other = trio.testing.memory_stream_pair()
    return Layer(one), Layer(other)


@asynccontextmanager
async def joined(
    make_pair, limits: Limits | None = None, *, max_held: int = 64 << 20
) -> AsyncIterator[tuple[Side, Side]]:
    limits = limits or Limits()
    one, other = Side("one", limits), Side("other", limits, max_held=max_held)
    dialled, accepted = await make_pair()
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as both:
            both.start_soon(other.listen, RawConnection(accepted, initiator=False), nursery)
            both.start_soon(
                one.dial, RawConnection(dialled, initiator=True), other.peer_id, nursery
            )
        yield one, other
        for side in (one, other):
            await side.connection.close()
        nursery.cancel_scope.cancel()


@pytest.fixture(params=[socket_pair, layer_pair], ids=["sockets", "layers"])
async def sides(request):
    async with joined(request.param) as both:
        kind = SocketChannel if request.param is socket_pair else LayeredChannel
        assert all(isinstance(side.connection.secured_conn.channel, kind) for side in both)
        yield both


@pytest.fixture
async def streams(sides):
    one, other = sides
    ours = await one.connection.open_stream()
    return ours, await other.connection.accept_stream()


async def read_exactly(stream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += await stream.read(size - len(data))
    return bytes(data)


async def test_megabytes_pass_both_ways_at_once(streams):
    ours, theirs = streams
    data = os.urandom(5 << 20)
    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(stream.write, data)
        assert await read_exactly(ours, len(data)) == data
        assert await read_exactly(theirs, len(data)) == data


async def test_an_end_is_told_apart_from_a_reset_and_a_lost_connection(sides):
    one, other = sides
    ended, broken, lost = [await one.connection.open_stream() for _ in range(3)]
    for stream in (ended, broken, lost):
        await stream.write(b"last words")
    await ended.close()
    await trio.testing.wait_all_tasks_blocked(0.05)
    await broken.reset()
    there = [await other.connection.accept_stream() for _ in range(3)]
    assert await read_exactly(there[0], 10) == b"last words"
    with pytest.raises(MuxedStreamEOF):
        await there[0].read()
    assert await read_exactly(there[1], 10) == b"last words"
    with pytest.raises(MuxedStreamReset):
        await there[1].read()
    await one.connection.close()
    assert await read_exactly(there[2], 10) == b"last words"
    with pytest.raises(MuxedStreamReset):
        await there[2].read()
    with pytest.raises(MuxedStreamReset):
        await there[2].write(b"anybody?")
    with pytest.raises(MuxedConnUnavailable):
        await other.connection.accept_stream()
    with pytest.raises(MuxedConnUnavailable):
        await other.connection.open_stream()


async def test_reading_goes_on_after_closing_and_writing_does_not(streams):
    ours, theirs = streams
    await ours.close()
    with pytest.raises(MuxedStreamClosed):
        await ours.write(b"late")
    await theirs.write(b"answer")
    assert await ours.read() == b"answer"


async def test_reads_and_writes_cancelled_at_any_moment_lose_and_repeat_nothing(streams):
    ours, theirs = streams
    dice = random.Random(5)
    written: list[bytes] = []
    received = bytearray()
    done = False

    async def write() -> None:
        nonlocal done
        for number in range(1500):
            piece = number.to_bytes(4, "big") * dice.choice([1, 50, 3000, 30_000])
            with trio.CancelScope(deadline=trio.current_time() + dice.random() * 0.0005):
                await ours.write(piece)
                written.append(piece)
            await trio.lowlevel.checkpoint()
        done = True
        await ours.close()

    async def read() -> None:
        while True:
            with trio.CancelScope(deadline=trio.current_time() + dice.random() * 0.0005):
                try:
                    received.extend(await theirs.read(dice.choice([1, 100, 65_536])))
                except MuxedStreamEOF:
                    return
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        nursery.start_soon(read)
    assert done
    assert bytes(received) == b"".join(written)
    assert len(written) > 300


async def test_a_reader_that_waits_makes_its_writer_wait_and_nobody_else(sides):
    one, other = sides
    slow = await one.connection.open_stream()
    quick = await one.connection.open_stream()
    unread = await other.connection.accept_stream()
    heard = await other.connection.accept_stream()
    sent = 0
    with trio.move_on_after(0.2):
        while True:
            await slow.write(bytes(10_000))
            sent += 10_000
    assert sent <= INITIAL_WINDOW + HIGH_WATER
    await quick.write(b"me first")
    assert await heard.read() == b"me first"
    assert await read_exactly(unread, sent) == bytes(sent)


async def test_a_write_that_waits_for_room_ends_with_the_stream(streams):
    ours, theirs = streams
    await ours.write(bytes(INITIAL_WINDOW + HIGH_WATER))
    async with trio.open_nursery() as nursery:

        async def write_more() -> None:
            with pytest.raises(MuxedStreamReset):
                await ours.write(b"x")

        nursery.start_soon(write_more)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await theirs.reset()


async def test_opening_waits_for_the_peer_to_keep_up():
    async with joined(layer_pair, Limits(open_backlog=2)) as (one, other):
        opened = [await one.connection.open_stream() for _ in range(20)]
        assert [stream.stream_id for stream in opened] == list(range(1, 41, 2))
        for _ in opened:
            await other.connection.accept_stream()


async def test_a_peer_that_ignores_flow_control_is_accused_and_cut_off(streams):
    ours, theirs = streams
    victim = theirs.muxed_conn
    ours.core.credit = 1 << 30
    await ours.write(bytes(INITIAL_WINDOW + 1))
    await victim.event_closed.wait()
    with pytest.raises(MuxedStreamReset):
        await read_exactly(theirs, INITIAL_WINDOW + 1)


async def test_a_task_that_only_writes_lets_others_run(streams):
    ours, _ = streams
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        for _ in range(240):  # what window and stream take without a wait
            await ours.write(bytes(2048))
        assert turns
        nursery.cancel_scope.cancel()


async def test_only_one_task_may_read(streams):
    ours, _ = streams
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.read)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await ours.read()
        nursery.cancel_scope.cancel()


class TestPressure:
    @pytest.mark.parametrize("make_pair", [socket_pair, layer_pair], ids=["sockets", "layers"])
    async def test_who_makes_us_hold_too_much_is_dropped_and_nothing_is_held(self, make_pair):
        async with joined(make_pair, max_held=4 * INITIAL_WINDOW) as (one, other):
            kept = []

            async def keep_all() -> None:
                with suppress(MuxedConnUnavailable):
                    while True:
                        kept.append(await other.connection.accept_stream())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_all)
                for _ in range(8):
                    stream = await one.connection.open_stream()
                    with suppress(MuxedStreamReset):
                        await stream.write(bytes(INITIAL_WINDOW))
            assert len(kept) > 3
            assert other.connection.is_closed
            assert sum(stream.core.unread for stream in kept) == 0
            assert "hold too much" in other.faults[0]

    def test_only_as_many_are_dropped_as_must_be_and_the_largest_first(self):
        class Holding:
            def __init__(self, held: int) -> None:
                self.held = held

            def relieve(self, _reason: str) -> None:
                self.held = 0

        pressure = Pressure(100)
        holders = [Holding(held) for held in (40, 5, 90, 41)]
        for holder in holders:
            pressure.watch(holder)
        pressure.received(12)
        assert [holder.held for holder in holders] == [40, 5, 90, 41]
        pressure.received(1)
        assert [holder.held for holder in holders] == [40, 5, 0, 41]


class TestPulse:
    async def test_a_silent_peer_is_given_up(self, autojump_clock):
        async with joined(layer_pair) as (one, other):
            stream = await one.connection.open_stream()
            other.connection.flush = lambda: None  # it hears, and says nothing any more
            other.connection.touch = lambda: None
            started = trio.current_time()
            with pytest.raises(MuxedStreamReset):
                await stream.read()
            assert 3.5 <= trio.current_time() - started < 5

    async def test_nobody_is_given_up_for_our_own_absence(self, autojump_clock):
        async with joined(layer_pair) as (one, other):
            for _ in range(5):
                autojump_clock.jump(60)
                await trio.sleep(1.1)
            assert one.connection.is_established
            other.connection.flush = other.connection.touch = lambda: None
            autojump_clock.jump(60)
            with trio.fail_after(5):
                await one.connection.event_closed.wait()

    async def test_an_idle_connection_stays_and_only_its_dialler_pings(self, autojump_clock):
        async with joined(layer_pair) as (one, other):
            await trio.sleep(100)
            assert one.connection.is_established
            assert other.connection.is_established
            assert one.connection._core._ping > 50
            assert other.connection._core._ping < 10
            assert one.connection.round_trip is not None

    async def test_a_peer_that_goes_away_is_let_finish_and_then_closed(self, autojump_clock):
        async with joined(layer_pair) as (one, other):
            stream = await one.connection.open_stream()
            theirs = await other.connection.accept_stream()
            other.connection._core.go_away()
            other.connection.touch()
            await trio.sleep(0.1)
            with pytest.raises(MuxedConnUnavailable):
                await one.connection.open_stream()
            await theirs.write(b"goes on")
            assert await stream.read() == b"goes on"
            with trio.fail_after(10):
                await one.connection.event_closed.wait()


class TestNegotiation:
    @pytest.mark.parametrize(
        "answer",
        [
            pytest.param(b"\x13/multistream/1.0.0\n\x03na\n", id="no"),
            pytest.param(b"\x13/multistream/2.0.0\n", id="another multistream"),
            pytest.param(proposal("/tls/1.0.0"), id="another protocol"),
        ],
    )
    async def test_a_listener_without_our_protocol_is_not_talked_to(self, answer):
        dialled, accepted = await layer_pair()
        await accepted.write(answer)
        with pytest.raises(NotSpoken):
            await Side("one", Limits()).security.secure_outbound(
                RawConnection(dialled, initiator=True), Side("other", Limits()).peer_id
            )

    async def test_a_dialler_says_all_it_can_in_one_breath(self):
        dialled, accepted = await layer_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                Side("one", Limits()).security.secure_outbound,
                RawConnection(dialled, initiator=True),
                Side("other", Limits()).peer_id,
            )
            await trio.testing.wait_all_tasks_blocked()
            said = await accepted.read(1000)
            assert said.startswith(proposal("/noise") + b"\x00\x20")
            assert len(said) == len(proposal("/noise")) + 34
            nursery.cancel_scope.cancel()
