"""Peers that die, hang and come back, as processes that get real signals."""

from __future__ import annotations

import itertools
import signal
from functools import partial

import pytest
import trio

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.mesh import PeerConnected, PeerLost, PeerUnreachable, StreamLost
from pinaivu_node.protocol.ids import Topic

ECHO = "/pinaivu/echo/1"
TOPIC = Topic("/pinaivu/test/1")
OUR_SEED = b"watcher" + bytes(25)

pytestmark = [pytest.mark.live, pytest.mark.timeout(60)]


async def start(start_peer, *arguments, **options):
    """Starting waits for the process to speak, which may need us to go on."""
    return await trio.to_thread.run_sync(partial(start_peer, *arguments, **options))


async def told(peer):
    return await trio.to_thread.run_sync(peer.told, abandon_on_cancel=True)


async def assert_answers(mesh, peer_id):
    stream = await mesh.open(peer_id, ECHO)
    await stream.send(b"there?")
    assert await stream.receive() == b"there?"
    return stream


async def assert_hears_gossip(mesh, peer, number):
    """It takes part in gossip again: what we publish arrives there."""
    word = f"word {number} "

    async def publish() -> None:
        for attempt in itertools.count():
            await mesh.publish(TOPIC, f"{word}{attempt}".encode())
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        while not (await told(peer)).get("heard", "").startswith(word):
            pass
        nursery.cancel_scope.cancel()


async def test_a_killed_peer_is_noticed_and_found_again_by_those_who_keep_it(start_peer):
    server = await start(start_peer, "server")
    async with (
        open_libp2p_mesh(MeshConfig(listen=()), seed=OUR_SEED) as mesh,
        mesh.watch_peers() as events,
    ):
        mesh.keep(server.address)
        assert await anext(events) == PeerConnected(server.peer_id)
        stream = await assert_answers(mesh, server.peer_id)
        server.kill()
        with trio.fail_after(5):
            with pytest.raises(StreamLost):
                await stream.receive()
            assert await anext(events) == PeerLost(server.peer_id)
        again = await start(start_peer, "server", listen=server.listen)
        assert again.peer_id == server.peer_id
        with trio.fail_after(5):
            assert await anext(events) == PeerConnected(server.peer_id)
            await assert_answers(mesh, server.peer_id)
            await assert_hears_gossip(mesh, again, 1)


async def test_a_killed_peer_that_keeps_us_comes_back_by_itself(start_peer):
    async with (
        open_libp2p_mesh(MeshConfig(hub=True), seed=OUR_SEED) as mesh,
        mesh.watch_peers() as events,
    ):
        for life in range(2):
            provider = await start(start_peer, "provider", mesh.addresses[0])
            with trio.fail_after(5):
                assert await anext(events) == PeerConnected(provider.peer_id)
                await assert_answers(mesh, provider.peer_id)
                await assert_hears_gossip(mesh, provider, life)
            provider.kill()
            with trio.fail_after(5):
                assert await anext(events) == PeerLost(provider.peer_id)


async def test_a_hung_peer_is_dropped_and_works_again_when_it_goes_on(start_peer):
    async with (
        open_libp2p_mesh(MeshConfig(hub=True), seed=OUR_SEED) as mesh,
        mesh.watch_peers() as events,
    ):
        provider = await start(start_peer, "sleeper", mesh.addresses[0])
        assert await anext(events) == PeerConnected(provider.peer_id)
        stream = await assert_answers(mesh, provider.peer_id)
        provider.signal(signal.SIGSTOP)
        with trio.fail_after(5):
            with pytest.raises(StreamLost):
                await stream.receive()
            assert await anext(events) == PeerLost(provider.peer_id)
            with pytest.raises(PeerUnreachable):
                await mesh.open(provider.peer_id, ECHO)
        provider.signal(signal.SIGCONT)
        with trio.fail_after(5):
            assert await anext(events) == PeerConnected(provider.peer_id)
            await assert_answers(mesh, provider.peer_id)
            await assert_hears_gossip(mesh, provider, 1)


async def test_a_peer_that_returns_while_its_old_self_hangs_works_within_five_seconds(start_peer):
    async with (
        open_libp2p_mesh(MeshConfig(hub=True), seed=OUR_SEED) as mesh,
        mesh.watch_peers() as events,
    ):
        old = await start(start_peer, "twin", mesh.addresses[0])
        assert await anext(events) == PeerConnected(old.peer_id)
        await assert_hears_gossip(mesh, old, 1)
        old.signal(signal.SIGSTOP)
        new = await start(start_peer, "twin", mesh.addresses[0])
        with trio.fail_after(5):
            await assert_hears_gossip(mesh, new, 2)
        await assert_answers(mesh, new.peer_id)


async def test_leaving_is_quick_even_when_a_peer_hangs(start_peer):
    async with open_libp2p_mesh(MeshConfig(), seed=OUR_SEED) as mesh:
        server = await start(start_peer, "stuck")
        await mesh.dial(server.address)
        await assert_answers(mesh, server.peer_id)
        server.signal(signal.SIGSTOP)
        started_at = trio.current_time()
    assert trio.current_time() - started_at < 3
