"""What only the memory network can do: latency, loss, partitions, crashes and hangs, repeatably."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest
import trio

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.memory import DEAD_AFTER, MemoryNetwork
from pinaivu_node.mesh.mesh import FrameStream, PeerConnected, PeerLost, PeerUnreachable, StreamLost
from pinaivu_node.protocol.ids import Topic

PROTOCOL = "/pinaivu/test/1"
TOPIC = Topic("/pinaivu/test/1")
ONE, TWO = b"1" * 32, b"2" * 32


@pytest.fixture
async def network(autojump_clock) -> AsyncIterator[MemoryNetwork]:
    async with MemoryNetwork(latency=0.1) as network:
        yield network


async def echo(stream: FrameStream) -> None:
    while True:
        await stream.send(await stream.receive())


async def test_latency_is_what_was_asked_for(network, autojump_clock):
    async with network.join(ONE) as one, network.join(TWO) as two:
        two.handle(PROTOCOL, echo)
        started_at = trio.current_time()
        await one.dial(two.addresses[0])
        stream = await one.open(two.peer_id, PROTOCOL)
        assert trio.current_time() - started_at == pytest.approx(0.4)
        await stream.send(b"ping")
        await stream.receive()
        assert trio.current_time() - started_at == pytest.approx(0.6)


async def test_a_crash_is_noticed_and_cancels_the_peer_alone(network, autojump_clock):
    stages = []

    async def live(*, task_status: trio.TaskStatus[str]) -> None:
        async with network.join(TWO) as two:
            two.handle(PROTOCOL, echo)
            task_status.started(two.addresses[0])
            await trio.sleep_forever()
        stages.append("it ended without an exception")

    async with (
        network.join(ONE) as one,
        trio.open_nursery() as nursery,
        one.watch_peers() as events,
    ):
        address = await nursery.start(live)
        peer = await one.dial(address)
        stream = await one.open(peer, PROTOCOL)
        assert await anext(events) == PeerConnected(peer)
        network.crash(peer)
        with pytest.raises(StreamLost):
            await stream.receive()
        assert await anext(events) == PeerLost(peer)
        with pytest.raises(PeerUnreachable):
            await one.dial(address)
        await nursery.start(live)
        await one.dial(address)
        nursery.cancel_scope.cancel()
    assert stages == ["it ended without an exception"]


async def test_a_short_partition_delays_and_a_long_one_disconnects(network, autojump_clock):
    async with network.join(ONE) as one, network.join(TWO) as two, one.watch_peers() as events:
        two.handle(PROTOCOL, echo)
        await one.dial(two.addresses[0])
        assert await anext(events) == PeerConnected(two.peer_id)
        stream = await one.open(two.peer_id, PROTOCOL)
        network.partition([one.peer_id], [two.peer_id])
        await stream.send(b"late")
        await trio.sleep(DEAD_AFTER / 2)
        network.heal()
        assert await stream.receive() == b"late"

        network.partition([one.peer_id])
        with pytest.raises(StreamLost):
            await stream.receive()
        assert await anext(events) == PeerLost(two.peer_id)
        with pytest.raises(PeerUnreachable):
            await one.dial(two.addresses[0])
        network.heal()
        await one.dial(two.addresses[0])


async def test_gossip_does_not_cross_a_partition(network, autojump_clock):
    async with network.join(ONE) as one, network.join(TWO) as two, two.subscribe(TOPIC) as inbox:
        await one.dial(two.addresses[0])
        network.partition([one.peer_id])
        await one.publish(TOPIC, b"lost")
        network.heal()
        await one.publish(TOPIC, b"heard")
        assert (await anext(inbox)).payload == b"heard"


async def test_a_hung_peer_is_given_up_and_may_return(network, autojump_clock):
    async with network.join(ONE) as one, network.join(TWO) as two, one.watch_peers() as events:
        one.keep(two.addresses[0])
        assert await anext(events) == PeerConnected(two.peer_id)
        network.hang(two.peer_id)
        with trio.fail_after(5):
            assert await anext(events) == PeerLost(two.peer_id)
        await trio.sleep(60)
        network.resume(two.peer_id)
        with trio.fail_after(5):
            assert await anext(events) == PeerConnected(two.peer_id)


async def heard_of_a_hundred(seed: int) -> list[bytes]:
    async with (
        MemoryNetwork(seed=seed, gossip_loss=0.3) as network,
        network.join(ONE) as one,
        network.join(TWO) as two,
        two.subscribe(TOPIC) as inbox,
    ):
        await one.dial(two.addresses[0])
        for number in range(100):
            await one.publish(TOPIC, b"%d" % number)
        heard = []
        with trio.move_on_after(1):
            while True:
                heard.append((await anext(inbox)).payload)
        return heard


async def test_the_same_seed_loses_the_same_messages(autojump_clock):
    first = await heard_of_a_hundred(1)
    assert first == await heard_of_a_hundred(1)
    assert first != await heard_of_a_hundred(2)
    assert 50 < len(first) < 90


async def test_a_thousand_peers_are_cheap(network, autojump_clock):
    """The bound is ten times what it takes here, for slow machines; the cost is linear."""
    heard = 0

    async def live(number: int, hub: str, *, task_status: trio.TaskStatus[None]) -> None:
        nonlocal heard
        async with network.join(b"%032d" % number) as mesh, mesh.subscribe(TOPIC) as inbox:
            await mesh.dial(hub)
            task_status.started()
            async for _ in inbox:
                heard += 1

    config = MeshConfig(hub=True)
    async with network.join(ONE, config) as hub, trio.open_nursery() as nursery:
        async with trio.open_nursery() as starting:
            for number in range(1000):
                starting.start_soon(nursery.start, live, number, hub.addresses[0])
        started_at = time.perf_counter()
        for _ in range(10):
            await hub.publish(TOPIC, b"offer")
        await trio.sleep(1)
        assert heard == 10_000
        assert (time.perf_counter() - started_at) / heard < 200e-6
        nursery.cancel_scope.cancel()
