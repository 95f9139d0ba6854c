"""What we remember of each peer: bans, budgets, and what was already said about it.  Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from pinaivu_node.protocol.ids import PeerId

_MAX_REMEMBERED: Final = 10_000
"""Bans and complaints kept, about 1 MB.  Identities are free to make, so an attacker can push out
the oldest; a new identity would have served him as well."""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class PeerBook:
    """Owned by one mesh; times are seconds of its clock and come in as arguments."""

    def __init__(self, *, max_held: int, gossip_per_second: int) -> None:
        self._max_held = max_held
        self._gossip_rate = gossip_per_second
        self._banned_until: OrderedDict[PeerId, float] = OrderedDict()
        self._complained: OrderedDict[PeerId, None] = OrderedDict()
        self._held: dict[PeerId, int] = {}
        self._streams: dict[PeerId, int] = {}
        self._gossip: dict[PeerId, _Bucket] = {}

    def ban(self, peer: PeerId, *, until: float) -> None:
        """Refuse this peer until then; a longer ban stands."""
        self._banned_until[peer] = max(until, self._banned_until.pop(peer, until))
        if len(self._banned_until) > _MAX_REMEMBERED:
            self._banned_until.popitem(last=False)

    def is_banned(self, peer: PeerId, *, now: float) -> bool:
        """Whether a ban stands; an expired one is forgotten."""
        until = self._banned_until.get(peer)
        if until is None:
            return False
        if until <= now:
            del self._banned_until[peer]
            return False
        return True

    def is_first_complaint(self, peer: PeerId) -> bool:
        """True once per peer: a peer that misbehaves all day gets one line in the log."""
        if peer in self._complained:
            return False
        self._complained[peer] = None
        if len(self._complained) > _MAX_REMEMBERED:
            self._complained.popitem(last=False)
        return True

    def hold(self, peer: PeerId, size: int) -> bool:
        """Account for bytes of this peer that we keep; False when it is over its budget."""
        held = self._held[peer] = self._held.get(peer, 0) + size
        return held <= self._max_held

    def release(self, peer: PeerId, size: int) -> None:
        """The opposite of `hold`."""
        held = self._held.get(peer, 0) - size
        if held > 0:
            self._held[peer] = held
        else:
            self._held.pop(peer, None)

    def open_stream(self, peer: PeerId) -> int:
        """Count one more stream opened by this peer; return how many it has now."""
        count = self._streams[peer] = self._streams.get(peer, 0) + 1
        return count

    def close_stream(self, peer: PeerId) -> None:
        """The opposite of `open_stream`."""
        count = self._streams.get(peer, 0) - 1
        if count > 0:
            self._streams[peer] = count
        else:
            self._streams.pop(peer, None)

    def admits_gossip(self, peer: PeerId, *, now: float) -> bool:
        """Take one message from this peer's allowance: a second's worth at once, then the rate."""
        rate = float(self._gossip_rate)
        bucket = self._gossip.setdefault(peer, _Bucket(rate, now))
        bucket.tokens = min(rate, bucket.tokens + (now - bucket.filled_at) * rate)
        bucket.filled_at = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    def forget_gossip(self, peer: PeerId) -> None:
        """Drop the allowance of a peer that left."""
        self._gossip.pop(peer, None)
