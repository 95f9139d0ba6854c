"""Who is connected, told to whoever wants to know."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from pinaivu_node.mesh.mesh import Link, Path, PeerConnected, PeerEvent, PeerLost
from pinaivu_node.protocol.ids import PeerId


class _Watcher(AsyncIterator[PeerEvent]):
    """The events one watcher has yet to read: at most two per peer, however slow it is."""

    def __init__(self) -> None:
        self._pending: deque[PeerEvent] = deque()
        self._readers = trio.lowlevel.ParkingLot()

    def tell(self, event: PeerEvent) -> None:
        # A connection that was never read of and is gone again is no news.
        if isinstance(event, PeerLost) and PeerConnected(event.peer) in self._pending:
            self._pending.remove(PeerConnected(event.peer))
            return
        self._pending.append(event)
        self._readers.unpark()

    async def __anext__(self) -> PeerEvent:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._pending:
            await self._readers.park()
        return self._pending.popleft()


class Presence:
    """Counts connections per peer; a peer is connected while it has one.

    A peer that has gone and come again is told as lost and connected, never as nothing, unless
    the watcher had not read of it at all: its streams are gone, and that is what watchers act on.
    """

    def __init__(self) -> None:
        self._connections: dict[PeerId, int] = {}
        self._watchers: list[_Watcher] = []
        self._changed = trio.lowlevel.ParkingLot()

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._connections

    def __len__(self) -> int:
        return len(self._connections)

    def peers(self) -> frozenset[PeerId]:
        """Everybody with a connection."""
        return frozenset(self._connections)

    def links(self) -> tuple[Link, ...]:
        """As links of a network on which all of them are alike."""
        return tuple(
            Link(peer=peer, path=Path.DIRECT, remote="", dialled=False, round_trip_ms=None)
            for peer in self._connections
        )

    def connect(self, peer: PeerId) -> None:
        """One more connection to this peer."""
        count = self._connections.get(peer, 0)
        self._connections[peer] = count + 1
        if count == 0:
            self._tell(PeerConnected(peer))

    def disconnect(self, peer: PeerId) -> None:
        """One connection less; harmless when there was none."""
        count = self._connections.get(peer, 0)
        if count > 1:
            self._connections[peer] = count - 1
        elif count == 1:
            del self._connections[peer]
            self._tell(PeerLost(peer))

    async def wait_lost(self, peer: PeerId) -> None:
        """Return when this peer has no connection, at once if it has none now."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while peer in self._connections:
            await self._changed.park()

    async def wait_connected(self, peer: PeerId) -> None:
        """Return when this peer has a connection, at once if it has one now."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while peer not in self._connections:
            await self._changed.park()

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[PeerEvent]]:
        """The events from now on, after one PeerConnected for each peer present."""
        watcher = _Watcher()
        for peer in self._connections:
            watcher.tell(PeerConnected(peer))
        self._watchers.append(watcher)
        try:
            yield watcher
        finally:
            self._watchers.remove(watcher)

    def _tell(self, event: PeerEvent) -> None:
        for watcher in self._watchers:
            watcher.tell(event)
        self._changed.unpark_all()
