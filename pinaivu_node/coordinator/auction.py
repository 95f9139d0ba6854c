"""Who gets a job and what it is paid: a sealed-bid, second-price auction in integers.

Pure, and decided from the bid set alone: the coordinator and everyone who replays an auction call
the same `decide` on the same leaves and get the same result to the bit.

A bid's rank is its generalised cost G, the money it asks plus the value of the time it takes,
divided by its reliability.  The lowest G wins and is paid what would just have tied with the next
one, so that asking one's true cost is the best strategy.  Standbys are the winners of the same
auction held again without those before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import (
    MILLION,
    Digest,
    Milliseconds,
    NanoX,
    PartsPerMillion,
    PeerId,
    UnixMilliseconds,
)
from pinaivu_node.protocol.market import (
    NO_DELAY,
    AnswerRecord,
    AuctionPolicy,
    AuctionRecord,
    Bid,
    JobTerms,
    Measurement,
    Pass,
    Preference,
)
from pinaivu_node.protocol.money import PriceList, TokenUsage, cost
from pinaivu_node.protocol.signing import open_untrusted
from pinaivu_node.protocol.wire import encode_body

ANSWERS: Final[tuple[type[Bid | Pass], ...]] = (Bid, Pass)
"""What a provider may say to an offer."""
MAX_UPLIFT: Final = 10**12
"""What the wire can carry: a million times the asked price, far above any ceiling met."""
COLD_SHARE: Final = PartsPerMillion(125_000)
"""What of the time to a first token no warm prompt saves: the way there and back, the queue, and
the step that makes the token.  An eighth: engines answer a warm prompt of some 500 tokens in less
than a fifth of a cold one's time, and longer ones save more."""


class LossReason(StrEnum):
    """Why an answer did not win the job."""

    OUTBID = "outbid"
    PASSED = "passed"
    MALFORMED = "malformed"
    LATE = "late"
    EXPIRED = "expired"
    BANNED = "banned"
    NOT_ALLOWED = "not_allowed"
    DENIED = "denied"
    WRONG_DIGEST = "wrong_digest"
    CONTEXT_TOO_SMALL = "context_too_small"
    ABOVE_CEILING = "above_ceiling"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Answer:
    """One provider's opened answer, and what was known of its sender when the auction closed."""

    message: Bid | Pass
    received_at: UnixMilliseconds
    measurement: Measurement
    banned: bool
    full: bool


@dataclass(frozen=True, slots=True)
class RankedAward:
    """The job, for one of those who may be given it: the winner first, then the standbys."""

    provider: PeerId
    rank: int
    model_digest: Digest
    prices: PriceList
    uplift_ppm: PartsPerMillion
    pay: NanoX
    """What the estimated job earns it: its asked price raised to what would just have tied."""
    expected_cost: NanoX
    expected_time_ms: Milliseconds
    generalised_cost: int
    warm_tokens: int = 0
    """Prompt tokens that it said it has warm, and that helped it win: they are billed as such."""
    delay_ms: Milliseconds = NO_DELAY
    """What it said it has to do first."""


@dataclass(frozen=True, slots=True)
class Loser:
    """One who answered and is neither winner nor standby."""

    provider: PeerId
    reason: LossReason
    detail: str
    margin: int | None
    """How far its generalised cost lay above the winner's; None if it never came to that."""


@dataclass(frozen=True, slots=True)
class AuctionResult:
    """What an auction decided; no awards means that nobody eligible bid."""

    awards: tuple[RankedAward, ...]
    losers: tuple[Loser, ...]

    def loss_counts(self) -> Counter[LossReason]:
        """How many lost for each reason."""
        return Counter(loser.reason for loser in self.losers)


@dataclass(frozen=True, slots=True)
class _Score:
    """An eligible bid, measured on the scale on which bids compete."""

    bid: Bid
    usage: TokenUsage
    expected_cost: NanoX
    expected_time_ms: Milliseconds
    generalised_cost: int
    reliability_ppm: int

    @property
    def order(self) -> tuple[int, int, str]:
        """Lowest wins; the name makes the order total."""
        return (self.generalised_cost, self.expected_cost, self.bid.bidder)


def decide(record: AuctionRecord, answers: Sequence[Answer]) -> AuctionResult:
    """Winner, standbys, their pay, and why everyone else lost; the order of answers is nothing."""
    scores: list[_Score] = []
    losers: list[Loser] = []
    for answer in answers:
        fault = _ineligibility(record, answer)
        if fault is not None:
            losers.append(Loser(answer.message.bidder, *fault, margin=None))
        elif isinstance(answer.message, Bid):
            scores.append(_score(record, answer.message, answer.measurement))
    scores.sort(key=lambda score: score.order)
    places = 1 + record.policy.standbys
    awards = tuple(
        _award(record, scores[rank : rank + 2], rank=rank)
        for rank in range(min(places, len(scores)))
    )
    for score in scores[places:]:
        margin = score.generalised_cost - scores[0].generalised_cost
        detail = f"{margin} NanoX above the winner"
        losers.append(Loser(score.bid.bidder, LossReason.OUTBID, detail, margin))
    losers.sort(key=lambda loser: loser.provider)
    return AuctionResult(awards=awards, losers=tuple(losers))


def ceiling_of(terms: JobTerms, policy: AuctionPolicy) -> PriceList:
    """The highest price of each kind that this job may cost: the client's, else the network's."""
    return terms.max_prices or policy.price_ceiling


def expected_usage(terms: JobTerms, *, warm_tokens: int) -> TokenUsage:
    """What the job is expected to use at a provider that has this much of the prompt warm."""
    warm = min(warm_tokens, terms.input_estimate)
    return TokenUsage(
        input=terms.input_estimate - warm, cached_input=warm, output=terms.output_estimate
    )


def wait_share(terms: JobTerms, *, warm_tokens: int) -> PartsPerMillion:
    """How much of the wait for a cold prompt's first token is left when so much of it is warm.

    The auction foretells a bid's wait by it, and the same share turns the wait that was measured
    into that of a cold prompt.  So whoever says warm what is cold is taken for as much slower.
    """
    usage = expected_usage(terms, warm_tokens=warm_tokens)
    warm = usage.cached_input * (MILLION - COLD_SHARE) // max(1, terms.input_estimate)
    return PartsPerMillion(MILLION - warm)


def time_value(policy: AuctionPolicy, preference: Preference) -> NanoX:
    """What a millisecond is worth to a client with this preference."""
    return {
        Preference.PRICE: policy.time_value_price,
        Preference.BALANCED: policy.time_value_balanced,
        Preference.LATENCY: policy.time_value_latency,
    }[preference]


def _ineligibility(record: AuctionRecord, answer: Answer) -> tuple[LossReason, str] | None:
    """Why this answer cannot win, whatever it asks; every doubt counts against it."""
    message = answer.message
    if message.request_id != record.terms.request_id:
        return LossReason.MALFORMED, "the answer is to another request"
    if isinstance(message, Pass):
        return LossReason.PASSED, message.reason.value
    return _timing_fault(record, answer, message) or (
        _sender_fault(record, answer) or _bid_fault(record, message)
    )


def _timing_fault(record: AuctionRecord, answer: Answer, bid: Bid) -> tuple[LossReason, str] | None:
    if answer.received_at > record.closed_at:
        return LossReason.LATE, f"{answer.received_at - record.closed_at} ms after the close"
    if bid.expires_at <= record.closed_at:
        return LossReason.EXPIRED, f"{record.closed_at - bid.expires_at} ms before the close"
    return None


def _sender_fault(record: AuctionRecord, answer: Answer) -> tuple[LossReason, str] | None:
    bidder = answer.message.bidder
    if answer.banned:
        return LossReason.BANNED, "the network has banned it"
    if record.allow is not None and bidder not in record.allow:
        return LossReason.NOT_ALLOWED, "it is not on the client's list"
    if bidder in record.deny:
        return LossReason.DENIED, "the client refuses it"
    if answer.full:
        return LossReason.FULL, "it was running as many jobs as it can"
    return None


def _bid_fault(record: AuctionRecord, bid: Bid) -> tuple[LossReason, str] | None:
    terms = record.terms
    if terms.model_digest is not None and bid.model_digest != terms.model_digest:
        return LossReason.WRONG_DIGEST, f"it serves {bid.model_digest}"
    needed = terms.input_estimate + terms.output_limit
    if bid.context_window < needed:
        return LossReason.CONTEXT_TOO_SMALL, f"{bid.context_window} tokens, {needed} needed"
    if not bid.prices.is_within(ceiling_of(terms, record.policy)):
        return LossReason.ABOVE_CEILING, "it asks more than the job may cost"
    return None


def _score(record: AuctionRecord, bid: Bid, measured: Measurement) -> _Score:
    terms = record.terms
    usage = expected_usage(terms, warm_tokens=bid.warm_tokens)
    expected_cost = cost(usage, bid.prices)
    waiting = measured.ttft_ms * wait_share(terms, warm_tokens=bid.warm_tokens) // MILLION
    speaking = usage.output * MILLION // measured.millitokens_per_second
    expected_time = bid.delay_ms + waiting + speaking
    worth = expected_cost + time_value(record.policy, terms.preference) * expected_time
    reliability = max(1, measured.reliability_ppm)
    return _Score(
        bid=bid,
        usage=usage,
        expected_cost=expected_cost,
        expected_time_ms=Milliseconds(expected_time),
        generalised_cost=worth * MILLION // reliability,
        reliability_ppm=reliability,
    )


def _award(record: AuctionRecord, contest: Sequence[_Score], *, rank: int) -> RankedAward:
    """The place for the first of `contest`, paid what would have tied with the second."""
    winner = contest[0]
    ceiling = ceiling_of(record.terms, record.policy)
    reserve = cost(winner.usage, ceiling)
    pay = reserve
    if len(contest) > 1:
        lead = contest[1].generalised_cost - winner.generalised_cost
        tie = winner.expected_cost + lead * winner.reliability_ppm // MILLION
        pay = NanoX(min(tie, reserve))
    prices = winner.bid.prices
    uplift = _uplift(winner.expected_cost, pay, prices=prices, ceiling=ceiling)
    return RankedAward(
        provider=winner.bid.bidder,
        rank=rank,
        model_digest=winner.bid.model_digest,
        prices=prices,
        uplift_ppm=uplift,
        pay=cost(winner.usage, prices, uplift_ppm=uplift),
        expected_cost=winner.expected_cost,
        expected_time_ms=winner.expected_time_ms,
        generalised_cost=winner.generalised_cost,
        warm_tokens=winner.usage.cached_input,
        delay_ms=winner.bid.delay_ms,
    )


def _uplift(asked: NanoX, pay: NanoX, *, prices: PriceList, ceiling: PriceList) -> PartsPerMillion:
    """By how much the asked prices are raised; no raised price passes the ceiling of its kind.

    The real job may be shaped otherwise than the estimate, so capping the total would not do: the
    hold is made at the ceiling, kind by kind, and the bill must fit into it.
    """
    if asked == 0:
        return PartsPerMillion(0)
    bounds = [MAX_UPLIFT, (pay - asked) * MILLION // asked]
    pairs = (
        (prices.input, ceiling.input),
        (prices.cached_input, ceiling.cached_input),
        (prices.output, ceiling.output),
    )
    bounds += [(most - price) * MILLION // price for price, most in pairs if price]
    return PartsPerMillion(min(bounds))


# --- the bid set ----------------------------------------------------------------------------------


def bid_set_leaves(record: AuctionRecord, answers: Sequence[AnswerRecord]) -> tuple[bytes, ...]:
    """What is hashed into the bid-set root and published after the close."""
    return (encode_body(record), *(encode_body(answer) for answer in answers))


def open_bid_set_untrusted(leaves: Sequence[bytes]) -> tuple[AuctionRecord, tuple[Answer, ...]]:
    """The auction inside published leaves, every answer's signature verified.

    Raises RemoteProtocolError: no leaves, an undecodable one, a forged answer, one about another
    request, or two answers of one provider.
    """
    if not leaves:
        raise RemoteProtocolError("a bid set starts with the auction's record")
    record = AuctionRecord.from_body_untrusted(leaves[0])
    answers = tuple(_open_answer_untrusted(record, leaf) for leaf in leaves[1:])
    if len({answer.message.bidder for answer in answers}) != len(answers):
        raise RemoteProtocolError("a provider answers twice in this bid set")
    return record, answers


def _open_answer_untrusted(record: AuctionRecord, leaf: bytes) -> Answer:
    kept = AnswerRecord.from_body_untrusted(leaf)
    message = open_untrusted(kept.answer, *ANSWERS, signer=kept.answer.signer)
    if message.bidder != kept.answer.signer:
        raise RemoteProtocolError(f"{kept.answer.signer} signed an answer of {message.bidder}")
    if message.request_id != record.terms.request_id:
        raise RemoteProtocolError("an answer in this bid set is to another request")
    return Answer(
        message=message,
        received_at=kept.received_at,
        measurement=kept.measurement,
        banned=kept.banned,
        full=kept.full,
    )
