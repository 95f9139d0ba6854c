"""How fast an engine is, as measured from outside: pure arithmetic on times that come in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_SMOOTHING: Final = 0.2
"""Weight of the newest measurement: the figures follow a change within some ten requests."""
_ENOUGH_TOKENS: Final = 4
"""An answer of fewer tokens says nothing about speed."""


@dataclass(slots=True)
class Timing:
    """When one generation was asked for and when its tokens came, in seconds of any clock."""

    asked: float
    waited: bool = False
    """It had to queue first, so its first token says nothing about the engine's speed."""
    first: float | None = None
    last: float = 0.0
    tokens: int = 0


class SpeedGauge:
    """Smoothed speed, time to first token and length of a generation."""

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self.ttft_ms = 0.0
        self.generated_tokens = 0
        self._duration_s = 0.0

    def preset(self, *, tokens_per_second: float, ttft_ms: float) -> None:
        """Begin with what a warm-up measured; what clients got counts more from then on."""
        self.tokens_per_second = tokens_per_second
        self.ttft_ms = ttft_ms

    def tokens(self, timing: Timing, count: int, *, now: float) -> None:
        """Account for tokens that came now."""
        if count == 0:
            return
        self.generated_tokens += count
        if timing.first is None:
            timing.first = now
            if not timing.waited:
                self.ttft_ms = _smoothed(self.ttft_ms, 1000 * (now - timing.asked))
        timing.last = now
        timing.tokens += count

    def finished(self, timing: Timing) -> None:
        """Account for a generation that is over."""
        if timing.first is None:
            return
        decoding = timing.last - timing.first
        self._duration_s = _smoothed(self._duration_s, decoding + self.ttft_ms / 1000)
        if timing.tokens >= _ENOUGH_TOKENS and decoding > 0:
            speed = (timing.tokens - 1) / decoding
            self.tokens_per_second = _smoothed(self.tokens_per_second, speed)

    def ttft_estimate_ms(self, *, ahead: int, capacity: int) -> int:
        """What one more request should expect, with so many to end before it can start."""
        return round(self.ttft_ms + 1000 * self._duration_s * ahead / max(1, capacity))


def _smoothed(old: float, new: float) -> float:
    return new if old == 0.0 else (1 - _SMOOTHING) * old + _SMOOTHING * new
