"""What all connections of one host hold together, bounded.

Identities are free, so a bound for each peer is none for all: a hundred peers that fill the windows
of streams which nobody reads would hold gigabytes.  What is held can only grow by what is received,
so it is added up whenever an eighth of the limit has come in, and costs nothing between.
"""

from __future__ import annotations

from typing import Final, Protocol

_LOOKS_PER_LIMIT: Final = 8


class Holder(Protocol):
    """A connection that holds what was not read yet."""

    @property
    def held(self) -> int:
        """So many bytes."""
        ...

    def relieve(self, reason: str) -> None:
        """Hold nothing any more, and close."""
        ...


class Pressure:
    """Owned by one host."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._holders: dict[Holder, None] = {}
        self._received = 0

    def watch(self, holder: Holder) -> None:
        """Count what this one holds."""
        self._holders[holder] = None

    def unwatch(self, holder: Holder) -> None:
        """The opposite of `watch`; harmless when repeated."""
        self._holders.pop(holder, None)

    def received(self, size: int) -> None:
        """So much came in on some connection; closes those that hold most, if all hold too much."""
        self._received += size
        if self._received * _LOOKS_PER_LIMIT >= self._limit:
            self._received = 0
            self._look()

    def _look(self) -> None:
        held = {holder: holder.held for holder in self._holders}
        total = sum(held.values())
        for holder in sorted(held, key=lambda holder: held[holder], reverse=True):
            if total <= self._limit:
                return
            self.unwatch(holder)
            total -= held[holder]
            holder.relieve(f"all peers together hold too much, and it most: {held[holder]:,} bytes")
