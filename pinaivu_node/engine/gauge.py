"""How fast an engine is and will be, as measured from outside: pure arithmetic on what comes in.

Two questions are answered here, and both end up in a bid: how soon one more request would have its
first token, and how fast the others would follow.  The second depends on how many sequences share
a step, so the time of a step is kept by their number.  The first is the longer of the wait for a
place and the prompts that are ahead in line, then the request's own prompt, then one step; and how
far such sums were off lately corrects the next one.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Final

_SMOOTHING: Final = 0.2
"""Weight of the newest measurement: the figures follow a change within some ten of them."""
_ENOUGH_TOKENS: Final = 4
"""An answer of fewer tokens says nothing about speed."""
_USUAL_TOKENS: Final = 128.0
"""Length of an answer before any has ended: what chats are answered with, more or less."""
_SLOWEST: Final = 1e-3
"""Tokens per second below which a speed is no measurement."""
_LONGEST_S: Final = 3600.0
"""Nobody waits longer for a first token; what is worse need not be told apart."""
_FARTHEST: Final = 8.0
"""How far off an estimate may count as having been, either way."""
_MAX_SIZES: Final = 1024
"""Batch sizes told apart; more sequences than any engine steps at once."""


@dataclass(slots=True)
class Timing:
    """When one generation was asked for and when its tokens came, in seconds of any clock."""

    asked: float
    waited: bool = False
    """It had to queue first, so its first token says nothing about the engine's speed."""
    answers: int = 1
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    """Of all its answers."""
    alone: bool = False
    """It had the engine for itself when it came."""
    expected_s: float = 0.0
    """What its first token would take by the sum that is corrected; 0 if nobody made it."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How an engine stands at this moment; the counts are of sequences."""

    running: int
    queued: int
    capacity: int
    queued_prefill_tokens: int = 0
    """Prompt tokens still to be computed before those of one more request."""
    prefill_tokens_per_second: float = 0.0
    """0 if nobody measured it: then first tokens are expected to come as they did lately."""

    @property
    def is_idle(self) -> bool:
        """Whether one more would have the engine for itself."""
        return self.running + self.queued == 0

    @property
    def has_room(self) -> bool:
        """Whether one more would have a place at once, though perhaps not its turn."""
        return self.running + self.queued < self.capacity

    @property
    def next_batch(self) -> int:
        """How many would run together once one more runs."""
        return max(1, min(self.running + self.queued + 1, self.capacity))


class StepTimes:
    """Seconds of one step, by the number of sequences in it; 0 where nothing was measured yet."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._sizes: list[int] = []

    def observe(self, size: int, seconds: float) -> None:
        """A step of so many sequences took so long."""
        size = max(1, min(size, _MAX_SIZES))
        if size not in self._seconds:
            bisect.insort(self._sizes, size)
        self._seconds[size] = _smoothed(self._seconds.get(size, 0.0), seconds)

    def seconds(self, size: int) -> float:
        """What a step of this size takes: measured, or on the line through its neighbours."""
        if not self._sizes or size in self._seconds:
            return self._seconds.get(size, 0.0)
        at = bisect.bisect(self._sizes, size)
        if 0 < at < len(self._sizes):
            return self._on_the_line(size, self._sizes[at - 1], self._sizes[at])
        return self._on_the_line(size, self._sizes[0], self._sizes[-1])

    def _on_the_line(self, size: int, low: int, high: int) -> float:
        at_low, at_high = self._seconds[low], self._seconds[high]
        slope = 0.0 if low == high else (at_high - at_low) / (high - low)
        guess = at_low + slope * (size - low)
        # Beyond what was measured noise must not run away with the line: more sequences never take
        # less time than fewer, nor more than if each was stepped alone.
        if size > high:
            return min(max(guess, at_high), at_high * size / high)
        if size < low:
            return max(min(guess, at_low), at_low * size / low)
        return guess


class SpeedGauge:
    """Smoothed speed, time to first token and length of an answer."""

    def __init__(self) -> None:
        self.generated_tokens = 0
        self._steps = StepTimes()
        self._ttft_s = 0.0
        self._idle_ttft_s = 0.0
        self._answer_tokens = _USUAL_TOKENS
        self._prompt_tokens = 0.0
        self._beside_tokens = 0.0
        self._beside_s = 0.0
        self._correction = 1.0

    def preset(self, *, tokens_per_second: float, ttft_ms: float) -> None:
        """Begin with what a warm-up measured; what clients got counts more from then on."""
        if tokens_per_second > _SLOWEST:
            self._steps.observe(1, 1 / tokens_per_second)
        self._ttft_s = self._idle_ttft_s = ttft_ms / 1000

    def prompt(self, computed_tokens: int) -> None:
        """A request came with a prompt of which so many tokens were not in the cache."""
        self._prompt_tokens = _smoothed(self._prompt_tokens, computed_tokens)

    def batch(self, running: int, tokens_per_second: float) -> None:
        """So many sequences run, and all together get so many tokens per second."""
        if running > 0 and tokens_per_second > _SLOWEST:
            self._steps.observe(running, running / tokens_per_second)

    def prompts_beside(self, tokens: int, seconds: float) -> None:
        """In so many seconds, in which others streamed, so many tokens of prompts were computed."""
        if tokens > 0 and seconds > 0:
            # Both are smoothed, not their quotient: what was measured longer counts more.
            self._beside_tokens = _smoothed(self._beside_tokens, tokens)
            self._beside_s = _smoothed(self._beside_s, seconds)

    def tokens(self, timing: Timing, count: int, *, now: float) -> None:
        """Account for tokens that came now."""
        if count == 0:
            return
        self.generated_tokens += count
        if timing.first is None:
            timing.first = now
            self._first_token(timing, now - timing.asked)
        timing.last = now
        timing.tokens += count

    def finished(self, timing: Timing, *, running: int | None = None) -> None:
        """Account for a generation that is over.

        `running` is how many sequences ran beside it, itself included, and None where `batch` is
        told of the speed, which knows better.
        """
        if timing.first is None:
            return
        decoding = timing.last - timing.first
        tokens = timing.tokens / timing.answers
        self._answer_tokens = _smoothed(self._answer_tokens, tokens)
        if running is not None and tokens >= _ENOUGH_TOKENS and decoding > 0:
            self._steps.observe(running, decoding / (tokens - 1))

    def speed_estimate(self, occupancy: Occupancy) -> float:
        """Tokens per second that one more request should expect; 0 if nothing is known yet."""
        seconds = self._steps.seconds(occupancy.next_batch)
        return 1 / seconds if seconds else 0.0

    def ttft_estimate_ms(self, occupancy: Occupancy) -> int:
        """How long one more request should expect to wait for its first token."""
        sum_s = self.expected_s(occupancy)
        if sum_s > 0:
            seconds = self._correction * sum_s
        elif occupancy.prefill_tokens_per_second > 0:
            seconds = self._idle_ttft_s
        else:
            seconds = self._wait_s(occupancy) + self._ttft_s
        return round(1000 * min(seconds, _LONGEST_S))

    def _first_token(self, timing: Timing, took: float) -> None:
        if not timing.waited:
            self._ttft_s = _smoothed(self._ttft_s, took)
        if timing.alone:
            self._idle_ttft_s = _smoothed(self._idle_ttft_s, took)
        if timing.expected_s > 0:
            ratio = max(1 / _FARTHEST, min(took / timing.expected_s, _FARTHEST))
            # Of ratios the geometric mean: twice too long and twice too short cancel out.
            self._correction = self._correction ** (1 - _SMOOTHING) * ratio**_SMOOTHING

    def expected_s(self, occupancy: Occupancy) -> float:
        """The sum that is corrected, for `Timing.expected_s`; 0 where it is not made.

        It is made for an engine that is at work and tells the speed of its prompts.
        """
        rate = occupancy.prefill_tokens_per_second
        if self._beside_s > 0:
            rate = self._beside_tokens / self._beside_s
        if occupancy.is_idle or not rate > _SLOWEST:  # nor if it is no number at all
            return 0.0
        ahead = max(self._wait_s(occupancy), occupancy.queued_prefill_tokens / rate)
        own = self._prompt_tokens / rate
        return ahead + own + self._steps.seconds(occupancy.next_batch)

    def _wait_s(self, occupancy: Occupancy) -> float:
        """Until a place is free: those who hold one leave evenly spread over an answer's time."""
        if occupancy.has_room:
            return 0.0
        duration = self._answer_tokens * self._steps.seconds(occupancy.next_batch)
        ahead = occupancy.running + occupancy.queued + 1 - occupancy.capacity
        return duration * ahead / max(1, occupancy.capacity)


def _smoothed(old: float, new: float) -> float:
    return new if old == 0.0 else (1 - _SMOOTHING) * old + _SMOOTHING * new
