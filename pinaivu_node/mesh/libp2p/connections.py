"""The connections of one mesh: to whom, what carries them, how they are closed."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, Final

import trio

from pinaivu_node.mesh.libp2p import host as libp2p_host
from pinaivu_node.mesh.libp2p.circuit import FramePipe
from pinaivu_node.mesh.libp2p.stream import Libp2pFrameStream
from pinaivu_node.mesh.libp2p.websocket import WebSocketStream
from pinaivu_node.mesh.mesh import Link, Path
from pinaivu_node.protocol.ids import PeerId

_GOODBYE: Final = 1.0
"""Seconds for a connection to close politely before its socket is closed under it."""


class Connections:
    """Those that are up.  Several to one peer are nothing strange."""

    def __init__(self, me: PeerId) -> None:
        self._me = me
        self._all: dict[Any, float] = {}
        """Since when; the oldest first."""

    def __contains__(self, connection: Any) -> bool:
        return connection in self._all

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._all))

    def __len__(self) -> int:
        return len(self._all)

    def add(self, connection: Any) -> None:
        """It is up."""
        self._all[connection] = trio.current_time()

    def discard(self, connection: Any) -> None:
        """It is gone."""
        self._all.pop(connection, None)

    def least_wanted(
        self, *, in_use: Container[PeerId], weight: Callable[[PeerId], float]
    ) -> Any | None:
        """Which to close where there are too many; None if all are of peers `in_use`.

        Of those that have nothing to do with us the one that behaved worst, and of the well-behaved
        the one that has been idle for longest: who has just come may be about to say what he wants.
        """
        idle = [each for each in self._all if libp2p_host.peer_of(each) not in in_use]
        return max(idle, key=lambda each: weight(libp2p_host.peer_of(each)), default=None)

    def of(self, peer: PeerId) -> list[Any]:
        """Those to this peer."""
        return [known for known in self._all if libp2p_host.peer_of(known) == peer]

    def is_detour(self, peer: PeerId) -> bool:
        """Whether this peer is connected through relays alone, or not at all."""
        return all(map(_is_relayed, self.of(peer)))

    def surplus(self, peer: PeerId) -> list[Any]:
        """The connections to this peer that both sides can do without.

        Those through relays where there is a better one.  Where there is none, those that the peer
        of the larger name dialled, if the other dialled as well.
        """
        relayed = [each for each in self.of(peer) if _is_relayed(each)]
        if not self.is_detour(peer):
            return relayed
        first = min(self._me, peer)
        kept = [each for each in relayed if (first == self._me) == each.muxed_conn.is_initiator]
        return [each for each in relayed if each not in kept] if kept else []

    def links(self, weight: Callable[[PeerId], float]) -> tuple[Link, ...]:
        """What is told of them; `weight` is that of a peer's offences."""
        return tuple(_link_of(each, weight) for each in self._all)

    async def close_when_quiet(
        self, connection: Any, streams: Callable[[], Iterable[Libp2pFrameStream]], *, quiet: float
    ) -> None:
        """Close a connection once no frame has passed on it for `quiet` seconds."""
        before = -1
        while connection in self:
            muxed = connection.muxed_conn
            frames = sum(
                each.frames for each in streams() if each.libp2p_stream.muxed_conn is muxed
            )
            if frames == before:
                await close_politely(connection)
                return
            before = frames
            await trio.sleep(quiet)


async def close_politely(connection: Any) -> None:
    """Say goodbye and close, in a second at most."""
    # Killed by another task: a close that hangs holds locks, and heeds no cancellation.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_kill_later, connection)
        await libp2p_host.close_connection(connection)
        nursery.cancel_scope.cancel()


async def _kill_later(connection: Any) -> None:
    await trio.sleep(_GOODBYE)
    await libp2p_host.kill_connection(connection)


def _path_of(connection: Any) -> Path:
    carrier = connection.muxed_conn.secured_conn.carrier
    if isinstance(carrier, FramePipe):
        return Path.RELAYED
    return Path.WEBSOCKET if isinstance(carrier, WebSocketStream) else Path.DIRECT


def _is_relayed(connection: Any) -> bool:
    return _path_of(connection) is Path.RELAYED


def _link_of(connection: Any, weight: Callable[[PeerId], float]) -> Link:
    peer = libp2p_host.peer_of(connection)
    muxed = connection.muxed_conn
    remote = muxed.secured_conn.carrier.get_remote_address()
    round_trip = muxed.round_trip
    return Link(
        peer=peer,
        path=_path_of(connection),
        remote="" if remote is None else f"{remote[0]}:{remote[1]}",
        dialled=muxed.is_initiator,
        round_trip_ms=None if round_trip is None else round(1000 * round_trip, 3),
        streams=muxed.streams,
        bytes_sent=muxed.bytes_sent,
        bytes_received=muxed.bytes_received,
        queued_bytes=muxed.queued,
        unread_bytes=muxed.held,
        offences=round(weight(peer), 3),
    )
