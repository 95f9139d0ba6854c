"""How fast a peer may speak: a token bucket.  Pure."""

from __future__ import annotations


class Pace:
    """Lets `rate` events a second through, and a burst of one second's worth."""

    def __init__(self, rate: int, *, now: float) -> None:
        self._rate = rate
        self._tokens = float(rate)
        self._seen_at = now

    def take(self, now: float) -> float:
        """Count one event; how many seconds it must wait."""
        refill = (now - self._seen_at) * self._rate
        self._tokens = min(float(self._rate), self._tokens + refill) - 1
        self._seen_at = now
        return max(0.0, -self._tokens / self._rate)

    def is_rested(self, now: float) -> bool:
        """Whether it would be as good as new: nothing is lost by forgetting it."""
        return self._tokens + (now - self._seen_at) * self._rate >= self._rate
