"""What each peer did wrong, and for how long it is refused for it.  Pure.

An offence weighs; what it weighs halves with time; a peer whose offences weigh as much as
`BANNED_AT` is banned, for a minute first and for twice as long each time after.  Identities are
free to make, so a ban makes abuse cost a handshake instead of nothing; and what one peer does harms
no other behind the same address.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pinaivu_node.protocol.ids import PeerId

BANNED_AT: Final = 100.0
HALF_LIFE: Final = 300.0
"""Seconds: a release with a fault, mended in an hour, is forgiven by then."""
FIRST_BAN: Final = 60.0
LONGEST_BAN: Final = 3600.0
_FREE_CONNECTIONS: Final = 60.0
"""That a peer may make at once; a crash loop with restarts every second is tolerated for two
minutes."""
_CONNECTIONS_PER_SECOND: Final = 0.5
_MAX_REMEMBERED: Final = 10_000
"""Peers whose offences are known, about 2 MB; the one that was longest without any is forgotten."""


class Offence(StrEnum):
    """What a peer can do wrong."""

    PROTOCOL = "protocol"
    """Bytes that no honest implementation sends: garbage, more than a window, a forged frame."""
    STREAM_FLOOD = "stream_flood"
    HOARDING = "hoarding"
    """It made us hold more than anybody else, when all held too much."""
    GOSSIP_FLOOD = "gossip_flood"
    """One message beyond its rate."""
    RECONNECTING = "reconnecting"
    """One connection beyond its rate."""
    STALLING = "stalling"
    """It reads nothing, or answers nothing: its connections are closed, but a process that hangs
    and a link that is slow look the same, so that it is never banned for it."""


_WEIGHT: Final = {
    Offence.PROTOCOL: 40.0,
    Offence.STREAM_FLOOD: 40.0,
    Offence.HOARDING: 40.0,
    Offence.GOSSIP_FLOOD: 0.05,
    Offence.RECONNECTING: 5.0,
    Offence.STALLING: 0.0,
}


@dataclass(slots=True)
class _Record:
    weight: float = 0.0
    weighed_at: float = 0.0
    bans: int = 0
    connections: float = _FREE_CONNECTIONS
    connected_at: float = 0.0


class Conduct:
    """Owned by one mesh; times are seconds of its clock and come in as arguments."""

    def __init__(self) -> None:
        self._records: OrderedDict[PeerId, _Record] = OrderedDict()

    def weight(self, peer: PeerId, *, now: float) -> float:
        """What the offences of this peer weigh now; 0 for a stranger."""
        record = self._records.get(peer)
        return 0.0 if record is None else _decayed(record, now)

    def offend(self, peer: PeerId, offence: Offence, *, now: float) -> float | None:
        """Note an offence; for how many seconds the peer is to be banned, if it is."""
        record = self._record(peer)
        record.weight = _decayed(record, now) + _WEIGHT[offence]
        record.weighed_at = now
        if record.weight < BANNED_AT:
            return None
        record.weight = 0.0
        record.bans += 1
        return min(LONGEST_BAN, FIRST_BAN * 2.0 ** min(record.bans - 1, 16))

    def admits_connection(self, peer: PeerId, *, now: float) -> bool:
        """Whether this peer makes connections no faster than it may; takes one of them."""
        record = self._record(peer)
        refilled = record.connections + (now - record.connected_at) * _CONNECTIONS_PER_SECOND
        record.connections = min(_FREE_CONNECTIONS, refilled)
        record.connected_at = now
        if record.connections < 1:
            return False
        record.connections -= 1
        return True

    def _record(self, peer: PeerId) -> _Record:
        record = self._records.get(peer)
        if record is None:
            record = self._records[peer] = _Record()
            if len(self._records) > _MAX_REMEMBERED:
                self._records.popitem(last=False)
        self._records.move_to_end(peer)
        return record


def _decayed(record: _Record, now: float) -> float:
    return float(record.weight * 0.5 ** (max(0.0, now - record.weighed_at) / HALF_LIFE))
