"""Who is cut off, banned, or let go, on real sockets."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.mesh import FrameStream, Mesh
from pinaivu_node.protocol.ids import Topic

TOPIC = Topic("/pinaivu/test/1")
ECHO = "/pinaivu/echo/1"
LISTEN = "/ip4/127.0.0.1/tcp/0"


@asynccontextmanager
async def mesh(**config) -> AsyncIterator[Mesh]:
    config = MeshConfig(**{"listen": (), **config})
    async with open_libp2p_mesh(config, seed=os.urandom(32)) as opened:
        yield opened


async def until(condition: Callable[[], bool], *, within: float = 5.0) -> None:
    with trio.fail_after(within):
        while not condition():  # noqa: ASYNC110 - the state of a mesh
            await trio.sleep(0.005)


async def echo(stream: FrameStream) -> None:
    while True:
        await stream.send(await stream.receive())


async def test_a_peer_that_floods_a_topic_is_banned_and_others_are_heard():
    async with (
        mesh(listen=(LISTEN,), hub=True, max_gossip_per_second=5) as victim,
        mesh() as spammer,
        mesh() as honest,
        victim.subscribe(TOPIC) as inbox,
    ):
        for each in (spammer, honest):
            await each.dial(victim.addresses[0])
        async with spammer.subscribe(TOPIC), honest.subscribe(TOPIC):
            await trio.sleep(0.3)  # subscriptions travel
            with trio.fail_after(20):
                while spammer.peer_id in victim.peers():
                    for _ in range(50):
                        await spammer.publish(TOPIC, b"spam")
                    await trio.sleep(0.01)  # its own queue would overflow
            statistics = victim.statistics()
            assert statistics.gossip_flood_offences >= 1900
            assert statistics.bans == 1
            await honest.publish(TOPIC, b"honest")
            with trio.fail_after(5):
                async for delivery in inbox:
                    if delivery.publisher == honest.peer_id:
                        break


async def test_a_full_house_lets_go_of_who_does_nothing_there():
    async with AsyncExitStack() as stack:
        victim = await stack.enter_async_context(mesh(listen=(LISTEN,), max_connections=4))
        victim.handle(ECHO, echo)
        honest, *idle = [await stack.enter_async_context(mesh()) for _ in range(4)]
        for each in (honest, *idle):
            await each.dial(victim.addresses[0])
        stream = await honest.open(victim.peer_id, ECHO)
        await until(lambda: len(victim.peers()) == 4)
        newcomer = await stack.enter_async_context(mesh())
        await newcomer.dial(victim.addresses[0])
        await until(lambda: idle[0].peer_id not in victim.peers())
        assert {newcomer.peer_id, honest.peer_id, *(each.peer_id for each in idle[1:])} == set(
            victim.peers()
        )
        assert victim.statistics().peers_evicted == 1
        await stream.send(b"still here")
        assert await stream.receive() == b"still here"


async def test_what_passes_on_a_link_is_told():
    async with mesh(listen=(LISTEN,)) as one, mesh() as other:
        one.handle(ECHO, echo)
        await other.dial(one.addresses[0])
        stream = await other.open(one.peer_id, ECHO)
        for _ in range(10):
            await stream.send(bytes(10_000))
            await stream.receive()
        (there,), (here,) = one.links(), other.links()
        assert 100_000 < here.bytes_sent < 120_000
        assert 100_000 < there.bytes_received <= here.bytes_sent
        assert here.streams >= 1
        assert (here.queued_bytes, here.unread_bytes, here.offences) == (0, 0, 0.0)
        await until(lambda: one.links()[0].round_trip_ms is not None)
