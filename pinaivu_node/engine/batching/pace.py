"""How much of a prompt may go into a step beside those who stream: pure arithmetic on durations."""

from __future__ import annotations

from typing import Final

_SMOOTHING: Final = 0.2
"""Weight of the newest step: a change of load shows within some ten steps."""
_GRAIN: Final = 16
"""Chunks are multiples of so many tokens, and never smaller: the matrix kernels' own grain."""


class Pace:
    """Measures steps, and says how long a chunk the next one can bear.

    A step with a chunk of a prompt in it takes longer, and everybody who streams waits for it.
    `stretch` is how many times longer than without it may take.
    """

    def __init__(self, *, longest_chunk: int, stretch: float) -> None:
        self._longest = longest_chunk
        self._stretch = stretch
        self._decode_s = 0.0
        self._batch = 1.0
        self._chunk_s = 0.0
        self._chunk_tokens = 0.0
        """Averages over steps: their ratio counts every token alike, in whatever chunk it came."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Speed of prompts; 0 if unknown."""
        return self._chunk_tokens / self._chunk_s if self._chunk_s else 0.0

    @property
    def decode_step_s(self) -> float:
        """Duration of a step of nothing but next tokens; 0 if unknown."""
        return self._decode_s

    @property
    def decode_batch(self) -> float:
        """How many sequences such a step served."""
        return self._batch

    def measured(self, seconds: float, *, decoding: int, prefill_tokens: int) -> None:
        """Account for one step."""
        if prefill_tokens == 0:
            self._decode_s = _smoothed(self._decode_s, seconds)
            self._batch = _smoothed(self._batch, decoding)
            return
        of_prefill = seconds - (self._decode_s if decoding else 0.0)
        # A chunk takes a tenth of its step at least: the estimate for the streams' share may be
        # stale.
        self._chunk_s = _smoothed(self._chunk_s, max(of_prefill, seconds / 10))
        self._chunk_tokens = _smoothed(self._chunk_tokens, prefill_tokens)

    def chunk(self, *, decoding: int) -> int:
        """Tokens of prompts for the next step, so many sequences streaming."""
        if decoding == 0 or self._chunk_s == 0.0:
            return self._longest
        if self._decode_s == 0.0:
            return _GRAIN
        bearable = (self._stretch - 1) * self._decode_s * self.prefill_tokens_per_second
        return max(_GRAIN, min(self._longest, int(bearable) // _GRAIN * _GRAIN))


def _smoothed(old: float, new: float) -> float:
    return new if old == 0.0 else (1 - _SMOOTHING) * old + _SMOOTHING * new
