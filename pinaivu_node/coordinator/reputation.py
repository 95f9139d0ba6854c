"""What gateways measured of providers, decayed; pure integers.

Each quality is an average that forgets: a new sample weighs more than an old one, and in idle
hours everything drifts back towards the policy's prior, so that a provider that was bad once and
therefore wins nothing gets another chance.  Nothing that a provider says of itself is counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pinaivu_node.protocol.ids import (
    MILLION,
    Digest,
    Milliseconds,
    PartsPerMillion,
    PeerId,
    UnixMilliseconds,
)
from pinaivu_node.protocol.market import (
    NO_DELAY,
    AuctionPolicy,
    Measurement,
    SegmentOutcome,
    SegmentReport,
)

HALF_LIFE_MS: Final = 60 * 60 * 1000
"""An hour: long against a job, short against the time in which a box is repaired or upgraded."""
SAMPLE: Final = 1000
"""The weight of one job; finer than one, so that halving it leaves something."""
MOST_SAMPLES: Final = 32
"""Beyond it the average forgets one job per job: about the last 30 jobs count."""
FEWEST_TOKENS: Final = 8
"""A speed taken over fewer tokens is the noise of one network frame."""
ALL_OF_IT: Final = PartsPerMillion(MILLION)
_SLOWEST_TTFT: Final = 10 * 60 * 1000
_NEVER: Final = UnixMilliseconds(0)


class Subject(NamedTuple):
    """What is measured: one provider running one model, weights and all."""

    provider: PeerId
    model_digest: Digest


@dataclass(frozen=True, slots=True)
class Average:
    """A mean and how much evidence is behind it."""

    mean: int = 0
    weight: int = 0

    def aged(self, elapsed_ms: int) -> Average:
        """The same, trusted less: half as much for each half-life, in straight lines between."""
        halvings, rest = divmod(max(0, elapsed_ms), HALF_LIFE_MS)
        if halvings > 40:
            return Average(self.mean, 0)
        weight = self.weight >> halvings
        return Average(self.mean, weight - weight * rest // (2 * HALF_LIFE_MS))

    def with_sample(self, value: int) -> Average:
        """The same, one job later."""
        total = self.weight + SAMPLE
        mean = (self.mean * self.weight + value * SAMPLE) // total
        return Average(mean, min(total, MOST_SAMPLES * SAMPLE))

    def blended(self, prior: int, *, prior_jobs: int) -> int:
        """The mean, with the prior counting as this many jobs."""
        prior_weight = prior_jobs * SAMPLE
        return (prior * prior_weight + self.mean * self.weight) // (prior_weight + self.weight)


@dataclass(frozen=True, slots=True)
class Track:
    """What is known of one subject."""

    ttft_ms: Average = field(default_factory=Average)
    millitokens_per_second: Average = field(default_factory=Average)
    reliability_ppm: Average = field(default_factory=Average)
    updated_at: UnixMilliseconds = _NEVER

    def aged(self, now: UnixMilliseconds) -> Track:
        """As it is to be trusted now."""
        elapsed = now - self.updated_at
        return Track(
            self.ttft_ms.aged(elapsed),
            self.millitokens_per_second.aged(elapsed),
            self.reliability_ppm.aged(elapsed),
            max(self.updated_at, now),
        )

    def after(
        self,
        report: SegmentReport,
        *,
        now: UnixMilliseconds,
        wait_share: PartsPerMillion = ALL_OF_IT,
        delay_ms: Milliseconds = NO_DELAY,
    ) -> Track:
        """What is known once a gateway has reported this segment.

        `wait_share` is what the provider's claim to have some of the prompt warm left of the wait;
        what is kept is the wait for a cold prompt.  `delay_ms` is what it said it has to do first;
        the auction counted it already.
        """
        aged = self.aged(now)
        ttft, speed, reliability = aged.ttft_ms, aged.millitokens_per_second, aged.reliability_ppm
        # A token that came before the delay was over says nothing of what comes after one.
        if report.ttft_ms is not None and report.ttft_ms >= delay_ms:
            cold = (report.ttft_ms - delay_ms) * MILLION // wait_share
            ttft = ttft.with_sample(min(cold, _SLOWEST_TTFT))
        measured = _speed(report)
        if measured is not None:
            speed = speed.with_sample(measured)
        verdict = _VERDICT[report.outcome]
        if verdict is not None:
            reliability = reliability.with_sample(verdict)
        return Track(ttft, speed, reliability, aged.updated_at)


# A client that leaves says nothing about the provider it left.
_VERDICT: Final[dict[SegmentOutcome, int | None]] = {
    SegmentOutcome.COMPLETED: MILLION,
    SegmentOutcome.CANCELLED: None,
    SegmentOutcome.REFUSED: 0,
    SegmentOutcome.DIED: 0,
    SegmentOutcome.STALLED: 0,
    SegmentOutcome.ERROR: 0,
}


def is_measured(report: SegmentReport, *, proven: bool) -> bool:
    """Whether a report says something of its provider; `proven` is whether its Proof is there.

    That it did well is believed only with tokens and the proof: nobody gets a record for nothing.
    """
    if report.outcome not in (SegmentOutcome.COMPLETED, SegmentOutcome.CANCELLED):
        return True
    return proven and report.usage.output > 0


def _speed(report: SegmentReport) -> int | None:
    """Millitokens per second after the first token; None if too little was seen."""
    if report.ttft_ms is None or report.usage.output < FEWEST_TOKENS:
        return None
    milliseconds = max(1, report.duration_ms - report.ttft_ms)
    return min(10**9, max(1, (report.usage.output - 1) * MILLION // milliseconds))


class Reputation:
    """Every provider's tracks."""

    def __init__(self, policy: AuctionPolicy, known: Iterable[tuple[Subject, Track]] = ()) -> None:
        self._policy = policy
        self._tracks = dict(known)

    def after(
        self,
        subject: Subject,
        report: SegmentReport,
        *,
        now: UnixMilliseconds,
        wait_share: PartsPerMillion = ALL_OF_IT,
        delay_ms: Milliseconds = NO_DELAY,
    ) -> Track:
        """What would be known after this report; nothing changes until it is `learn`ed."""
        track = self._tracks.get(subject, Track())
        return track.after(report, wait_share=wait_share, delay_ms=delay_ms, now=now)

    def learn(self, subject: Subject, track: Track) -> None:
        """Believe it from now on; it has been stored."""
        self._tracks[subject] = track

    def measurement(self, subject: Subject, *, now: UnixMilliseconds) -> Measurement:
        """What an auction goes by: measured where there is evidence, the prior where not."""
        policy = self._policy
        track = self._tracks.get(subject, Track()).aged(now)
        jobs = policy.prior_weight
        ttft = track.ttft_ms.blended(policy.prior_ttft_ms, prior_jobs=jobs)
        speed = track.millitokens_per_second.blended(
            policy.prior_millitokens_per_second, prior_jobs=jobs
        )
        reliability = track.reliability_ppm.blended(policy.prior_reliability_ppm, prior_jobs=jobs)
        return Measurement(
            ttft_ms=Milliseconds(ttft),
            millitokens_per_second=max(1, speed),
            reliability_ppm=PartsPerMillion(reliability),
            samples=track.reliability_ppm.weight // SAMPLE,
        )
