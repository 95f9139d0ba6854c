"""How much a peer may send us on one stream, and when it is told that it may send more.  Pure.

At every moment `allowance + unread + read but not given back == size`.  A window only grows while
the sum of all windows of the connection stays within the budget, so that what a peer can make us
hold is bounded by the larger of the budget and 256 KiB for each stream it may open.
"""

from __future__ import annotations

from typing import Final

from pinaivu_node.mesh.yamux.frames import INITIAL_WINDOW

FAST: Final = 4.0
"""A half window that was filled within so many round trips was likely held up by the window; Go's
implementation uses the same factor."""


class WindowBudget:
    """What all windows of one connection may be together, and the round trip they go by."""

    def __init__(self, limit: int, *, largest: int) -> None:
        self._limit = limit
        self._largest = largest
        self._total = 0
        self.round_trip: float | None = None
        self.now = 0.0

    @property
    def total(self) -> int:
        """The sum of all windows."""
        return self._total

    def open(self) -> None:
        """Count a new stream's window; it has that by right, also above the limit."""
        self._total += INITIAL_WINDOW

    def close(self, size: int) -> None:
        """A stream with a window of this size is gone."""
        self._total -= size

    def grow(self, size: int, *, since: float) -> int:
        """How much to add to a window of `size` of which half was filled since then."""
        if self.round_trip is None or self.now - since > FAST * self.round_trip:
            return 0
        growth = min(size, self._largest - size, self._limit - self._total)
        if growth <= 0:
            return 0
        self._total += growth
        return growth


class ReceiveWindow:
    """One stream's window on our side."""

    __slots__ = ("_budget", "_given_at", "_read", "allowance", "size")

    def __init__(self, budget: WindowBudget) -> None:
        self._budget = budget
        self._given_at = budget.now
        self._read = 0
        self.size = INITIAL_WINDOW
        self.allowance = INITIAL_WINDOW
        """What the peer may still send; the parser subtracts from it."""
        budget.open()

    def read(self, size: int) -> int:
        """Note that so much was read; return what to give back to the peer now, mostly 0."""
        self._read += size
        if self._read < self.size // 2:
            return 0
        growth = self._budget.grow(self.size, since=self._given_at)
        given, self._read = self._read + growth, 0
        self._given_at = self._budget.now
        self.size += growth
        self.allowance += given
        return given

    def close(self) -> None:
        """The stream is gone."""
        self._budget.close(self.size)
