"""A session to a peer that comes, goes, refuses and misbehaves; in virtual time."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import trio

from pinaivu_node.mesh.memory import MemoryNetwork
from pinaivu_node.mesh.mesh import FrameStream, Mesh
from pinaivu_node.mesh.session import keep_session
from pinaivu_node.protocol.errors import PeerAction, RemoteProtocolError

PROTOCOL = "/pinaivu/test/1"
OURS, THEIRS = b"o" * 32, b"t" * 32


@pytest.fixture
async def network(autojump_clock) -> AsyncIterator[MemoryNetwork]:
    async with MemoryNetwork(latency=0.01) as network:
        yield network


@dataclass
class Greeter:
    """Serves a session by saying hello and then listening until the stream is lost."""

    started_at: list[float] = field(default_factory=list)
    begun: trio.Event = field(default_factory=trio.Event)

    async def __call__(self, stream: FrameStream) -> None:
        self.started_at.append(trio.current_time())
        self.begun.set()
        await stream.send(b"hello")
        while True:
            await stream.receive()

    async def next_session(self) -> None:
        await self.begun.wait()
        self.begun = trio.Event()


async def listen(stream: FrameStream) -> None:
    while True:
        await stream.receive()


async def test_a_session_is_opened_again_when_its_peer_comes_back(network, autojump_clock):
    greeter = Greeter()
    async with network.join(OURS) as mesh, trio.open_nursery() as nursery:
        for life in range(3):
            async with network.join(THEIRS) as theirs:
                theirs.handle(PROTOCOL, listen)
                if life == 0:
                    mesh.keep(theirs.addresses[0])
                    nursery.start_soon(keep_session, mesh, theirs.peer_id, PROTOCOL, greeter)
                with trio.fail_after(5):
                    await greeter.next_session()
                await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert len(greeter.started_at) == 3


async def test_a_session_over_which_the_peer_hangs_up_is_retried_with_growing_delays(
    network, autojump_clock
):
    async def hang_up(stream: FrameStream) -> None:
        await stream.receive()

    greeter = Greeter()
    async with network.join(OURS) as mesh, network.join(THEIRS) as theirs:
        theirs.handle(PROTOCOL, hang_up)
        mesh.keep(theirs.addresses[0])
        with trio.move_on_after(60):
            await keep_session(mesh, theirs.peer_id, PROTOCOL, greeter, dice=lambda: 0.0)
    gaps = [later - sooner for sooner, later in itertools.pairwise(greeter.started_at)]
    assert gaps == pytest.approx(sorted(gaps))
    assert 1.0 <= gaps[-1] <= 1.2


async def test_a_protocol_not_yet_spoken_is_waited_for(network, autojump_clock):
    greeter = Greeter()
    async with (
        network.join(OURS) as mesh,
        network.join(THEIRS) as theirs,
        trio.open_nursery() as nursery,
    ):
        mesh.keep(theirs.addresses[0])
        nursery.start_soon(keep_session, mesh, theirs.peer_id, PROTOCOL, greeter)
        await trio.sleep(30)
        theirs.handle(PROTOCOL, listen)
        with trio.fail_after(3):
            await greeter.next_session()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("action", [PeerAction.BAN, PeerAction.DISCONNECT])
async def test_a_peer_that_misbehaves_is_dealt_with(network, autojump_clock, action):
    async def accuse(_stream: FrameStream) -> None:
        raise RemoteProtocolError("a forged award", action=action)

    async with network.join(OURS) as mesh, network.join(THEIRS) as theirs:
        theirs.handle(PROTOCOL, listen)
        await mesh.dial(theirs.addresses[0])
        with trio.move_on_after(1):
            await keep_session(mesh, theirs.peer_id, PROTOCOL, accuse)
        assert mesh.peers() == frozenset()


async def test_a_bug_of_ours_is_not_hidden(network, autojump_clock):
    async def fail(_stream: FrameStream) -> None:
        raise ZeroDivisionError

    async with network.join(OURS) as mesh, network.join(THEIRS) as theirs:
        theirs.handle(PROTOCOL, listen)
        await mesh.dial(theirs.addresses[0])
        with pytest.raises(ZeroDivisionError):
            await keep_session(mesh, theirs.peer_id, PROTOCOL, fail)


async def test_cancelling_resets_the_stream(network, autojump_clock):
    async def open_streams(mesh: Mesh) -> int:
        return mesh.statistics().open_streams

    async with network.join(OURS) as mesh, network.join(THEIRS) as theirs:
        theirs.handle(PROTOCOL, listen)
        await mesh.dial(theirs.addresses[0])
        with trio.move_on_after(5):
            await keep_session(mesh, theirs.peer_id, PROTOCOL, Greeter())
        await trio.sleep(1)
        assert [await open_streams(mesh), await open_streams(theirs)] == [0, 0]
