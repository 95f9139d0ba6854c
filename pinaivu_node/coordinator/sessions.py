"""The market streams of the peers that are here, and what waits to be sent on each.

Nothing here waits for a peer: what is said to it goes into its outbox, and a peer whose outbox
overflows is dropped, so that one that does not read costs the others nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import trio

from pinaivu_node.coordinator.pace import Pace
from pinaivu_node.mesh.mesh import FrameStream, MeshError
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId
from pinaivu_node.protocol.market import Hello
from pinaivu_node.protocol.wire import Message, encode

logger = logging.getLogger(__name__)

_MAX_FRAMES: Final = 4096
_MAX_BYTES: Final = 4 << 20
"""A burst of a thousand awards; a peer that is further behind is not reading."""


class Session:
    """One peer's market stream; it ends with the stream."""

    def __init__(self, stream: FrameStream, hello: Hello, pace: Pace) -> None:
        self.role: Final = hello.role
        self.incarnation: Final = hello.incarnation
        self.pace: Final = pace
        self._stream = stream
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._roster: bytes | None = None
        self._waiting = trio.Event()
        self._dropped = False

    @property
    def peer(self) -> PeerId:
        """Who it is with."""
        return self._stream.peer

    def say(self, message: Message) -> None:
        """Send a message, in its turn."""
        self.send(encode(message))

    def send(self, frame: bytes) -> None:
        """Send an encoded message, in its turn; a peer too far behind is dropped instead."""
        if self._dropped:
            return
        self._frames.append(frame)
        self._bytes += len(frame)
        if len(self._frames) > _MAX_FRAMES or self._bytes > _MAX_BYTES:
            self.drop("it does not read what it is sent")
            return
        self._waiting.set()

    def tell_roster(self, frame: bytes) -> None:
        """Send a roster; one that was not sent yet is replaced by it."""
        self._roster = frame
        self._waiting.set()

    def drop(self, reason: str) -> None:
        """End the session from our side."""
        if not self._dropped:
            logger.info("%s %s is dropped: %s", self.role, self.peer, reason)
            self._dropped = True
            self._frames.clear()
            self._stream.reset()

    async def receive(self) -> bytes:
        """The next frame, no faster than its pace.  Raises as the stream does."""
        frame = await self._stream.receive()
        wait = self.pace.take(trio.current_time())
        if wait > 0:
            await trio.sleep(wait)
        return frame

    async def run(self, read: Callable[[Session], Awaitable[None]]) -> None:
        """Send what waits while `read` takes in what comes; over when either is.

        Raises what `read` raises; a stream lost in sending ends it quietly.
        """
        failure: RemoteProtocolError | MeshError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, nursery.cancel_scope)
            try:
                await read(self)
            except (RemoteProtocolError, MeshError) as exc:
                failure = exc  # raised outside the nursery, which would wrap it
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _pump(self, session: trio.CancelScope) -> None:
        try:
            while True:
                await self._waiting.wait()
                self._waiting = trio.Event()
                await self._send_all()
        except MeshError:
            session.cancel()

    async def _send_all(self) -> None:
        while self._frames:
            frame = self._frames.popleft()
            self._bytes -= len(frame)
            await self._stream.send(frame)
        if self._roster is not None:
            roster, self._roster = self._roster, None
            await self._stream.send(roster)


class Sessions:
    """Who is here, by name; a peer has one session, its newest."""

    def __init__(self) -> None:
        self._sessions: dict[PeerId, Session] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._sessions.values()))

    def enter(self, session: Session) -> None:
        """A peer is here; what it had before is dropped."""
        before = self._sessions.pop(session.peer, None)
        if before is not None:
            before.drop("it has opened another session")
        self._sessions[session.peer] = session

    def leave(self, session: Session) -> bool:
        """A session is over; whether the peer is gone with it."""
        if self._sessions.get(session.peer) is not session:
            return False
        del self._sessions[session.peer]
        return True

    def is_here(self, peer: PeerId) -> bool:
        """Whether a message to this peer could be sent."""
        return peer in self._sessions

    def incarnation_of(self, peer: PeerId) -> bytes:
        """Which life of this peer is here; empty if none is, or if it does not say."""
        session = self._sessions.get(peer)
        return b"" if session is None else session.incarnation

    def remembers(self, peer: PeerId, incarnation: bytes) -> bool:
        """Whether this peer is here and still knows what it did in that life of it.

        Nobody knows after our own restart, when the life is unknown: then it is given the time.
        """
        if not self.is_here(peer):
            return False
        return incarnation in (b"", self.incarnation_of(peer))

    def say(self, peer: PeerId, message: Message) -> None:
        """Send to a peer if it is here; what it misses it asks for again."""
        self.send(peer, encode(message))

    def send(self, peer: PeerId, frame: bytes) -> None:
        """As `say`, already encoded."""
        session = self._sessions.get(peer)
        if session is not None:
            session.send(frame)

    def drop(self, peer: PeerId, reason: str) -> None:
        """End the session of a peer, if it has one."""
        session = self._sessions.get(peer)
        if session is not None:
            session.drop(reason)
