"""What every Mesh promises, asked of both: real sockets in real time, memory in virtual time."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import trio

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.mesh import (
    MAX_FRAME_BYTES,
    Delivery,
    FrameStream,
    Mesh,
    MeshError,
    PeerConnected,
    PeerLost,
    PeerUnreachable,
    StreamEnded,
    StreamLost,
)
from pinaivu_node.protocol.errors import LocalProtocolError, PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import Milliseconds, Topic

ECHO = "/pinaivu/echo/1"
TOPIC = Topic("/pinaivu/test/1")


pytestmark = pytest.mark.timeout(20)


async def echo(stream: FrameStream) -> None:
    try:
        while True:
            await stream.send(await stream.receive())
    except StreamEnded:
        await stream.end()


async def frames_until(error: type[MeshError], stream: FrameStream) -> list[bytes]:
    """What arrives before this error, which must come."""
    frames: list[bytes] = []
    try:
        while True:
            frames.append(await stream.receive())
    except error:
        return frames


async def send_until_lost(stream: FrameStream, size: int) -> None:
    try:
        while True:
            await stream.send(bytes(size))
    except StreamLost:
        pass


async def hear(publisher: Mesh, inbox: AsyncIterator[Delivery], prefix: bytes) -> Delivery:
    """Gossip is best effort, and needs a moment to know its subscribers: repeat until heard."""
    for number in itertools.count():
        await publisher.publish(TOPIC, prefix + b"%d" % number)
        with trio.move_on_after(0.05):
            while not (delivery := await anext(inbox)).payload.startswith(prefix):
                pass
            return delivery
    raise AssertionError


class TestGossip:
    async def test_a_subscriber_hears_what_another_publishes_and_who_did(self, network, clock):
        async with network.join("hub") as hub, network.join("leaf") as leaf:
            await leaf.dial(hub.addresses[0])
            async with leaf.subscribe(TOPIC) as inbox:
                delivery = await hear(hub, inbox, b"offer")
        assert delivery.publisher == hub.peer_id
        assert delivery.payload.startswith(b"offer")

    async def test_everybody_around_a_hub_hears_everybody(self, network, clock):
        async with (
            network.join("hub", MeshConfig(hub=True)) as hub,
            network.join("one") as one,
            network.join("two") as two,
        ):
            await one.dial(hub.addresses[0])
            await two.dial(hub.addresses[0])
            async with hub.subscribe(TOPIC), one.subscribe(TOPIC) as inbox, two.subscribe(TOPIC):
                assert (await hear(hub, inbox, b"from hub ")).publisher == hub.peer_id
                assert (await hear(two, inbox, b"from two ")).publisher == two.peer_id

    @pytest.mark.parametrize("milliseconds", range(0, 24, 4))
    async def test_a_subscription_is_heard_of_whenever_it_is_made(
        self, network, clock, milliseconds
    ):
        async with network.join("hub") as hub, network.join("leaf") as leaf:
            await leaf.dial(hub.addresses[0])
            await trio.sleep(milliseconds / 1000)
            async with leaf.subscribe(TOPIC) as inbox:
                await hear(hub, inbox, b"offer")

    async def test_a_publisher_does_not_hear_itself(self, network, clock):
        async with network.join("hub") as hub, network.join("leaf") as leaf:
            await leaf.dial(hub.addresses[0])
            async with hub.subscribe(TOPIC) as own, leaf.subscribe(TOPIC) as inbox:
                await hear(hub, inbox, b"mine")
                assert (await hear(leaf, own, b"theirs")).publisher == leaf.peer_id

    async def test_two_subscriptions_of_one_topic_hear_the_same(self, network, clock):
        async with network.join("hub") as hub, network.join("leaf") as leaf:
            await leaf.dial(hub.addresses[0])
            async with leaf.subscribe(TOPIC) as first:
                async with leaf.subscribe(TOPIC) as second:
                    heard = await hear(hub, first, b"both")
                    assert await anext(second) == heard
                await hear(hub, first, b"after")

    async def test_a_payload_of_a_mebibyte_passes_and_a_longer_one_is_our_bug(self, network, clock):
        async with network.join("hub") as hub, network.join("leaf") as leaf:
            await leaf.dial(hub.addresses[0])
            async with leaf.subscribe(TOPIC) as inbox:
                await hear(hub, inbox, b"warm")
                await hub.publish(TOPIC, b"x" * MAX_FRAME_BYTES)
                while len((await anext(inbox)).payload) != MAX_FRAME_BYTES:
                    pass
                with pytest.raises(LocalProtocolError):
                    await hub.publish(TOPIC, b"x" * (MAX_FRAME_BYTES + 1))

    async def test_a_full_inbox_drops_the_oldest_and_counts(self, network, clock):
        async with network.join("hub") as hub, network.join("leaf") as leaf:
            await leaf.dial(hub.addresses[0])
            async with leaf.subscribe(TOPIC) as inbox, leaf.subscribe(TOPIC) as slow:
                await hear(hub, inbox, b"warm")
                for number in range(10):
                    await hub.publish(TOPIC, b"%d" % number + bytes(MAX_FRAME_BYTES - 1))
                    while not (await anext(inbox)).payload.startswith(b"%d" % number):
                        pass
                assert leaf.statistics().gossip_dropped > 0
                oldest = await anext(slow)
                assert oldest.payload[:1] in b"0123456789"
                assert len(oldest.payload) == MAX_FRAME_BYTES


class TestStreams:
    async def test_frames_arrive_whole_and_in_order_both_ways(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, echo)
            await client.dial(server.addresses[0])
            stream = await client.open(server.peer_id, ECHO)
            assert stream.peer == server.peer_id
            frames = [b"", b"a", b"b" * 5000, bytes(range(256)) * 300, b"", b"last"]
            for frame in frames:
                await stream.send(frame)
            assert [await stream.receive() for _ in frames] == frames

    async def test_the_handler_knows_who_called(self, network, clock):
        callers = []

        async def note(stream: FrameStream) -> None:
            callers.append(stream.peer)
            await stream.send(b"noted")
            await stream.end()

        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, note)
            await client.dial(server.addresses[0])
            stream = await client.open(server.peer_id, ECHO)
            assert await stream.receive() == b"noted"
            assert callers == [client.peer_id]

    async def test_a_stream_may_be_opened_by_the_side_that_was_dialled(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            client.handle(ECHO, echo)
            await client.dial(server.addresses[0])
            async with server.watch_peers() as events:
                assert await anext(events) == PeerConnected(client.peer_id)
            stream = await server.open(client.peer_id, ECHO)
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"

    async def test_frames_of_concurrent_senders_never_interleave(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, echo)
            await client.dial(server.addresses[0])
            stream = await client.open(server.peer_id, ECHO)

            async def send(sender: int) -> None:
                for number in range(20):
                    await stream.send(bytes([sender, number]) * (100 * sender + 1))

            async with trio.open_nursery() as nursery:
                for sender in range(8):
                    nursery.start_soon(send, sender)
                seen: dict[int, list[int]] = {}
                for _ in range(160):
                    frame = await stream.receive()
                    sender, number = frame[0], frame[1]
                    assert frame == bytes([sender, number]) * (100 * sender + 1)
                    seen.setdefault(sender, []).append(number)
            assert seen == {sender: list(range(20)) for sender in range(8)}

    async def test_a_mebibyte_passes_and_a_longer_frame_is_our_bug(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, echo)
            await client.dial(server.addresses[0])
            stream = await client.open(server.peer_id, ECHO)
            with pytest.raises(LocalProtocolError):
                await stream.send(bytes(MAX_FRAME_BYTES + 1))
            largest = bytes(range(256)) * (MAX_FRAME_BYTES // 256)
            await stream.send(largest)
            assert await stream.receive() == largest

    async def test_end_comes_after_all_frames_and_the_other_direction_goes_on(self, network, clock):
        async def count_then_answer(stream: FrameStream) -> None:
            frames = await frames_until(StreamEnded, stream)
            await stream.send(b"%d" % len(frames))
            await stream.end()

        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, count_then_answer)
            await client.dial(server.addresses[0])
            stream = await client.open(server.peer_id, ECHO)
            for _ in range(100):
                await stream.send(b"")
            await stream.end()
            with pytest.raises(StreamLost):
                await stream.send(b"after END")
            assert await stream.receive() == b"100"
            for _ in range(2):
                with pytest.raises(StreamEnded):
                    await stream.receive()

    async def test_a_reset_is_lost_and_not_ended(self, network, clock):
        async def send_and_reset(stream: FrameStream) -> None:
            await stream.receive()
            stream.reset()
            stream.reset()

        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, send_and_reset)
            await client.dial(server.addresses[0])
            stream = await client.open(server.peer_id, ECHO)
            await stream.send(b"go")
            with pytest.raises(StreamLost):
                await stream.receive()
            await send_until_lost(stream, 100)

    async def test_returning_without_end_is_lost(self, network, clock):
        async def leave(stream: FrameStream) -> None:
            await stream.receive()

        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, leave)
            await client.dial(server.addresses[0])
            stream = await client.open(server.peer_id, ECHO)
            await stream.send(b"go")
            with pytest.raises(StreamLost):
                await stream.receive()

    async def test_cancelled_sends_and_receives_lose_and_repeat_nothing(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, echo)
            await client.dial(server.addresses[0])
            stream = await client.open(server.peer_id, ECHO)
            received: list[int] = []
            accepted: list[int] = []

            async def send() -> None:
                for number in range(300):
                    with trio.CancelScope() as scope:
                        if number % 3 == 0:
                            scope.cancel()
                        await stream.send(b"%d" % number)
                        accepted.append(number)
                await stream.end()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                try:
                    while True:
                        with trio.move_on_after(0.0005):
                            received.append(int(await stream.receive()))
                except StreamEnded:
                    pass
            assert received == accepted
            assert len(accepted) == 200
            assert client.peers() == {server.peer_id}

    async def test_a_cancelled_open_leaves_the_connection_working(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, echo)
            await client.dial(server.addresses[0])
            for attempt in range(20):
                with trio.move_on_after(0.0005 * attempt):
                    (await client.open(server.peer_id, ECHO)).reset()
            stream = await client.open(server.peer_id, ECHO)
            await stream.send(b"still here")
            assert await stream.receive() == b"still here"

    async def test_sixty_four_streams_at_once(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, echo)
            await client.dial(server.addresses[0])

            async def talk(number: int) -> None:
                stream = await client.open(server.peer_id, ECHO)
                for turn in range(5):
                    await stream.send(b"%d/%d" % (number, turn))
                    assert await stream.receive() == b"%d/%d" % (number, turn)
                await stream.end()
                with pytest.raises(StreamEnded):
                    await stream.receive()

            async with trio.open_nursery() as nursery:
                for number in range(64):
                    nursery.start_soon(talk, number)

    async def test_one_more_stream_than_allowed_costs_the_connection(self, network, clock):
        async def wait(stream: FrameStream) -> None:
            await trio.sleep_forever()

        config = MeshConfig(max_streams_per_peer=16)
        async with network.join("server", config) as server, network.join("client") as client:
            server.handle(ECHO, wait)
            await client.dial(server.addresses[0])
            opened = 0
            try:
                while opened < 32:
                    await client.open(server.peer_id, ECHO)
                    opened += 1
            except PeerUnreachable:
                pass
            assert opened <= 16
            assert server.statistics().peers_dropped == 1

    async def test_handlers_whose_streams_are_gone_still_count(self, network, clock):
        running = most = 0
        go_on = trio.Event()

        async def linger(stream: FrameStream) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await go_on.wait()
            running -= 1

        config = MeshConfig(max_streams_per_peer=8)
        async with network.join("server", config) as server, network.join("client") as client:
            server.handle(ECHO, linger)
            server.handle("/pinaivu/other/1", echo)
            for _ in range(2):  # a new connection is no clean slate
                await client.dial(server.addresses[0])
                for _ in range(10):
                    with suppress(StreamLost, PeerUnreachable):  # from the ninth on it is refused
                        stream = await client.open(server.peer_id, ECHO)
                        await stream.send(b"a request")
                        stream.reset()
                    with trio.fail_after(2):
                        while server.statistics().open_streams:  # noqa: ASYNC110 - the mesh's
                            await trio.sleep(0.01)
                await client.disconnect(server.peer_id)
            assert most == 8
            go_on.set()
            await client.dial(server.addresses[0])
            with trio.fail_after(2):
                while running:  # noqa: ASYNC110 - the handlers' to tell
                    await trio.sleep(0.01)
            stream = await client.open(server.peer_id, "/pinaivu/other/1")
            await stream.send(b"served again")
            assert await stream.receive() == b"served again"

    async def test_a_slow_reader_makes_its_writer_wait_and_nobody_else(self, network, clock):
        go_on = trio.Event()

        async def read_late(stream: FrameStream) -> None:
            await go_on.wait()
            await echo(stream)

        async with network.join("server") as server, network.join("client") as client:
            server.handle("/pinaivu/slow/1", read_late)
            server.handle(ECHO, echo)
            await client.dial(server.addresses[0])
            slow = await client.open(server.peer_id, "/pinaivu/slow/1")
            sent = 0
            with trio.move_on_after(0.5):
                while True:
                    await slow.send(b"%07d" % sent + bytes(10_000))
                    sent += 1
            assert sent * 10_000 < 4 << 20

            quick = await client.open(server.peer_id, ECHO)
            await quick.send(b"me first")
            assert await quick.receive() == b"me first"

            go_on.set()
            for number in range(sent):
                assert (await slow.receive())[:7] == b"%07d" % number

    async def test_a_peer_that_never_reads_is_dropped_and_logged_once(self, network, clock, caplog):
        async def never_read(stream: FrameStream) -> None:
            await trio.sleep_forever()

        config = MeshConfig(stall_limit=0.3)
        async with network.join("server") as server, network.join("client", config) as client:
            server.handle(ECHO, never_read)
            await client.dial(server.addresses[0])
            stream = await client.open(server.peer_id, ECHO)
            with caplog.at_level(logging.WARNING):
                await send_until_lost(stream, 10_000)
            assert client.statistics().peers_dropped == 1
            if clock is None:
                assert caplog.text.count("read nothing") == 1


class TestHandlers:
    async def test_an_exception_resets_its_stream_and_nothing_else(self, network, clock, caplog):
        async def fail(stream: FrameStream) -> None:
            await stream.receive()
            raise ValueError("a bug of ours")

        async with network.join("server") as server, network.join("client") as client:
            server.handle("/pinaivu/fail/1", fail)
            server.handle(ECHO, echo)
            await client.dial(server.addresses[0])
            healthy = await client.open(server.peer_id, ECHO)
            with caplog.at_level(logging.ERROR):
                failing = await client.open(server.peer_id, "/pinaivu/fail/1")
                await failing.send(b"go")
                with pytest.raises(StreamLost):
                    await failing.receive()
            assert caplog.text.count("a handler failed") == 1
            await healthy.send(b"unharmed")
            assert await healthy.receive() == b"unharmed"

    @pytest.mark.parametrize("action", [PeerAction.DISCONNECT, PeerAction.BAN])
    async def test_a_fault_of_the_peer_is_acted_on(self, network, clock, action):
        async def accuse(stream: FrameStream) -> None:
            await stream.receive()
            raise RemoteProtocolError("forged", action=action)

        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, accuse)
            await client.dial(server.addresses[0])
            stream = await client.open(server.peer_id, ECHO)
            await stream.send(b"forgery")
            async with client.watch_peers() as events:
                assert await anext(events) == PeerConnected(server.peer_id)
                assert await anext(events) == PeerLost(server.peer_id)
            if action is PeerAction.BAN:
                with pytest.raises(PeerUnreachable):
                    await client.dial(server.addresses[0])
                with pytest.raises(PeerUnreachable):
                    await server.dial(client.addresses[0])
            else:
                await client.dial(server.addresses[0])

    async def test_an_ignored_fault_costs_the_stream_only(self, network, clock):
        async def shrug(stream: FrameStream) -> None:
            await stream.receive()
            raise RemoteProtocolError("late", action=PeerAction.IGNORE)

        async with network.join("server") as server, network.join("client") as client:
            server.handle(ECHO, shrug)
            await client.dial(server.addresses[0])
            for _ in range(2):
                stream = await client.open(server.peer_id, ECHO)
                await stream.send(b"sorry")
                with pytest.raises(StreamLost):
                    await stream.receive()
            assert client.peers() == {server.peer_id}


class TestPeers:
    async def test_dialling_says_who_is_there_and_a_second_time_does_nothing(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            for _ in range(2):
                assert await client.dial(server.addresses[0]) == server.peer_id
            assert client.peers() == {server.peer_id}
            assert client.statistics().connected_peers == 1

    async def test_both_may_dial_at_the_same_time(self, network, clock):
        async with network.join("one") as one, network.join("two") as two:
            one.handle(ECHO, echo)
            two.handle(ECHO, echo)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.dial, two.addresses[0])
                nursery.start_soon(two.dial, one.addresses[0])
            for here, there in ((one, two), (two, one)):
                stream = await here.open(there.peer_id, ECHO)
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"

    async def test_another_peer_than_expected_is_refused(self, network, clock):
        async with (
            network.join("server") as server,
            network.join("other") as other,
            network.join("client") as client,
        ):
            place = server.addresses[0].partition("/p2p/")[0]
            with pytest.raises(PeerUnreachable):
                await client.dial(f"{place}/p2p/{other.peer_id}")
            assert client.peers() == frozenset()
            await client.dial(server.addresses[0])

    @pytest.mark.parametrize(
        "address",
        ["", "nonsense", "/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1/p2p/x", "/p2p/" * 500],
    )
    async def test_an_address_that_is_none_is_unreachable(self, network, clock, address):
        async with network.join("client") as client:
            with pytest.raises(PeerUnreachable):
                await client.dial(address)

    async def test_nobody_there_is_unreachable(self, network, clock):
        async with network.join("client") as client:
            async with network.join("server") as server:
                address, peer = server.addresses[0], server.peer_id
            with pytest.raises(PeerUnreachable):
                await client.dial(address)
            with pytest.raises(PeerUnreachable):
                await client.open(peer, ECHO)

    async def test_a_protocol_not_spoken_is_unreachable(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            await client.dial(server.addresses[0])
            with pytest.raises(PeerUnreachable):
                await client.open(server.peer_id, "/pinaivu/unknown/1")
            assert client.peers() == {server.peer_id}

    async def test_a_kept_peer_is_found_again_when_it_comes_back(self, network, clock):
        async with network.join("client") as client, client.watch_peers() as events:
            async with network.join("server") as server:
                server.handle(ECHO, echo)
                client.keep(server.addresses[0])
                assert await anext(events) == PeerConnected(server.peer_id)
                stream = await client.open(server.peer_id, ECHO)
            with pytest.raises(StreamLost):
                await stream.receive()
            assert await anext(events) == PeerLost(server.peer_id)
            async with network.join("server") as server:
                server.handle(ECHO, echo)
                with trio.fail_after(5):
                    assert await anext(events) == PeerConnected(server.peer_id)
                    stream = await client.open(server.peer_id, ECHO)
                    await stream.send(b"again")
                    assert await stream.receive() == b"again"
                client.forget(server.peer_id)
                assert client.peers() == {server.peer_id}
            assert await anext(events) == PeerLost(server.peer_id)
            assert client.statistics().redials > 0

    async def test_gossip_reaches_a_subscriber_that_came_back(self, network, clock):
        async with network.join("hub", MeshConfig(hub=True)) as hub:
            for life in (b"first ", b"second "):
                async with network.join("leaf") as leaf:
                    await leaf.dial(hub.addresses[0])
                    async with leaf.subscribe(TOPIC) as inbox:
                        with trio.fail_after(5):
                            await hear(hub, inbox, life)

    async def test_gossip_of_a_publisher_that_came_back_is_heard(self, network, clock):
        async with network.join("leaf") as leaf, leaf.subscribe(TOPIC) as inbox:
            for life in (b"first ", b"second "):
                async with network.join("hub") as hub:
                    await leaf.dial(hub.addresses[0])
                    with trio.fail_after(5):
                        await hear(hub, inbox, life)

    async def test_disconnecting_is_noticed_by_both(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            async with server.watch_peers() as events:
                await client.dial(server.addresses[0])
                assert await anext(events) == PeerConnected(client.peer_id)
                await client.disconnect(server.peer_id)
                assert client.peers() == frozenset()
                assert await anext(events) == PeerLost(client.peer_id)
            await client.disconnect(server.peer_id)
            await client.dial(server.addresses[0])

    async def test_a_ban_holds_in_both_directions_and_expires(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            await client.dial(server.addresses[0])
            async with server.watch_peers() as events:
                assert await anext(events) == PeerConnected(client.peer_id)
                server.ban(client.peer_id, duration=Milliseconds(600))
                assert await anext(events) == PeerLost(client.peer_id)
            async with client.watch_peers() as events:
                while server.peer_id in client.peers():
                    await anext(events)
            with pytest.raises(PeerUnreachable):
                await server.dial(client.addresses[0])
            client.keep(server.addresses[0])
            async with server.watch_peers() as events:
                banned_at = trio.current_time()
                assert await anext(events) == PeerConnected(client.peer_id)
                assert trio.current_time() - banned_at > 0.2

    async def test_present_peers_are_told_first(self, network, clock):
        async with network.join("server") as server, network.join("client") as client:
            await client.dial(server.addresses[0])
            async with client.watch_peers() as events:
                assert await anext(events) == PeerConnected(server.peer_id)


class TestClosing:
    async def test_closing_is_told_to_peers_and_may_be_repeated(self, network, clock):
        async with network.join("client") as client, network.join("server") as server:
            server.handle(ECHO, echo)
            address = server.addresses[0]
            await client.dial(address)
            stream = await client.open(server.peer_id, ECHO)
            async with client.watch_peers() as events:
                assert await anext(events) == PeerConnected(server.peer_id)
                await server.close()
                await server.close()
                with trio.fail_after(3):
                    assert await anext(events) == PeerLost(server.peer_id)
                with pytest.raises(StreamLost):
                    await stream.receive()
            with pytest.raises(PeerUnreachable):
                await client.dial(address)

    async def test_what_the_block_raises_comes_out_as_it_is(self, network, clock):
        with pytest.raises(KeyError):
            async with network.join("peer"):
                raise KeyError("mine")
