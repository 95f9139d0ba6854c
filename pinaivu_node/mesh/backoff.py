"""How long to wait before the next attempt.  Pure: the dice come in as an argument."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential delays with jitter, in seconds.

    The ceiling is 2 s because a peer that comes back under its old identity must work again within
    5 s, handshakes included.  Half of each delay is random, so that a hundred providers that lost
    one coordinator do not return in one wave.
    """

    first: float = 0.1
    ceiling: float = 2.0

    def delay(self, failures: int, *, dice: float) -> float:
        """The wait after the `failures`-th failure in a row, counted from 1; 0 ≤ dice < 1."""
        longest = min(self.ceiling, self.first * 2.0 ** min(failures - 1, 32))
        return longest * (0.5 + 0.5 * dice)
