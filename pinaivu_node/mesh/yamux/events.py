"""What the owner of a connection is told.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pinaivu_node.mesh.yamux.stream import Stream


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer opened this stream."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class Readable:
    """Where there was nothing to read there are bytes, an end, or a break.  Told once for each."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class Writable:
    """All but `Stream.low_water` of what was sent on this stream has left, or it broke.

    Told once after each `Stream.want_room`.
    """

    stream: Stream


@dataclass(frozen=True, slots=True)
class Closed:
    """This stream is in a final state: the connection has forgotten it."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The peer took a stream of ours: there is room for one more that it has not taken yet."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class Measured:
    """Our ping came back: `Connection.round_trip` is new."""

    round_trip: float


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer takes no more streams; open ones go on.  Told once, however often it is said."""

    reason: int


Event = Opened | Readable | Writable | Closed | Acknowledged | Measured | GoneAway
