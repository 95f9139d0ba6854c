"""What a relay lets pass, and for whom.  Pure: times are seconds that come in as arguments."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, PositiveFloat, PositiveInt

from pinaivu_node.protocol.ids import PeerId

_MAX_REMEMBERED: Final = 10_000
"""Senders whose allowance is kept; each is a connected peer or was one lately."""


class RelayLimits(BaseModel, frozen=True, extra="forbid"):
    """What a relay gives away, at most.  A pipe carries prompts and tokens: kilobytes a second."""

    pipes: PositiveInt = 512
    """At once; each is two streams and up to half a mebibyte that waits."""
    pipes_per_peer: PositiveInt = 64
    """Of which a peer is one end; as many gateways as a provider keeps.  Below the streams that a
    peer may open, so that whoever asks for one more is told so and not cut off."""
    bytes_per_second: PositiveInt = 1 << 20
    """That one peer sends, over all its pipes: a thousand answers of 50 tokens a second each in
    batches, or a longest prompt in a second."""
    burst: PositiveInt = 4 << 20
    bytes_per_pipe: PositiveInt = 4 << 30
    """A day of a busy provider; then the two connect anew."""
    seconds_per_pipe: PositiveFloat = 24 * 3600.0
    """No pipe is for ever: its ends try a direct way again."""
    stall: PositiveFloat = 5.0
    """A pipe whose reader takes nothing for so long is closed, before the one who sends takes the
    relay for hung."""


@dataclass(slots=True)
class _Allowance:
    left: float
    at: float


class Pipe:
    """One pipe, by its two ends."""

    __slots__ = ("ends", "left")

    def __init__(self, ends: tuple[PeerId, PeerId], left: int) -> None:
        self.ends = ends
        self.left = left


class PipeBook:
    """Owned by one relay."""

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self.pipes_made = 0
        self.bytes_passed = 0
        self.refused = 0
        self._pipes: set[Pipe] = set()
        self._count: dict[PeerId, int] = {}
        self._allowances: OrderedDict[PeerId, _Allowance] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pipes)

    def open(self, source: PeerId, target: PeerId) -> Pipe | str:
        """A pipe between these two, or why there is none."""
        reason = self._objection(source, target)
        if reason is not None:
            self.refused += 1
            return reason
        pipe = Pipe((source, target), self.limits.bytes_per_pipe)
        self._pipes.add(pipe)
        self.pipes_made += 1
        for peer in pipe.ends:
            self._count[peer] = self._count.get(peer, 0) + 1
        return pipe

    def close(self, pipe: Pipe) -> None:
        """The opposite of `open`."""
        self._pipes.discard(pipe)
        for peer in pipe.ends:
            self._count[peer] -= 1
            if not self._count[peer]:
                del self._count[peer]

    def pass_on(self, pipe: Pipe, sender: PeerId, size: int, *, now: float) -> float | None:
        """Count a chunk: how long its sender has to wait, or None if the pipe may carry no more."""
        if size > pipe.left:
            return None
        pipe.left -= size
        self.bytes_passed += size
        limits = self.limits
        allowance = self._allowance_of(sender, now)
        regained = (now - allowance.at) * limits.bytes_per_second
        allowance.left = min(limits.burst, allowance.left + regained) - size
        allowance.at = now
        return max(0.0, -allowance.left / limits.bytes_per_second)

    def _allowance_of(self, peer: PeerId, now: float) -> _Allowance:
        """Kept beyond the pipe, or a peer would have a new one for each."""
        allowance = self._allowances.get(peer)
        if allowance is None:
            allowance = self._allowances[peer] = _Allowance(self.limits.burst, now)
            if len(self._allowances) > _MAX_REMEMBERED:
                self._allowances.popitem(last=False)
        return allowance

    def _objection(self, source: PeerId, target: PeerId) -> str | None:
        limits = self.limits
        if source == target:
            return "you asked for yourself"
        if len(self._pipes) >= limits.pipes:
            return f"all {limits.pipes} pipes are taken"
        for peer in (source, target):
            if self._count.get(peer, 0) >= limits.pipes_per_peer:
                return f"{peer} has {limits.pipes_per_peer} pipes already"
        return None
