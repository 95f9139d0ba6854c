"""Why a job gets no award, said so that its gateway can tell its client what to do.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pinaivu_node.coordinator.auction import AuctionResult, LossReason
from pinaivu_node.coordinator.config import CoordinatorConfig
from pinaivu_node.coordinator.roster import Market
from pinaivu_node.protocol.ids import Milliseconds, PeerId, UnixMilliseconds
from pinaivu_node.protocol.market import (
    JobRefused,
    JobRequest,
    JobTerms,
    ModelOffer,
    PassReason,
    RefusalReason,
)

_SOON: Final = Milliseconds(1000)
"""A heartbeat: by then it is known who has become free or come back."""


def refused(
    terms: JobTerms,
    reason: RefusalReason,
    explanation: str,
    *,
    retry_after_ms: Milliseconds | None = None,
) -> JobRefused:
    """The refusal as it is sent."""
    return JobRefused(
        request_id=terms.request_id,
        reason=reason,
        explanation=explanation[:300],
        retry_after_ms=retry_after_ms,
    )


def overloaded(terms: JobTerms, explanation: str) -> JobRefused:
    """There is too much to do just now."""
    return refused(terms, RefusalReason.OVERLOADED, explanation, retry_after_ms=_SOON)


def no_credit(terms: JobTerms, *, balance: int, hold: int) -> JobRefused:
    """The gateway cannot pay for the worst case of this job."""
    return refused(
        terms,
        RefusalReason.NO_CREDIT,
        f"the gateway's balance is {balance} NanoX, and this job may cost up to {hold} NanoX",
    )


def duplicate(terms: JobTerms) -> JobRefused:
    """A request id is good for one job."""
    return refused(
        terms, RefusalReason.DUPLICATE, f"{terms.request_id} was asked for before: draw a new id"
    )


def fault_of_terms(
    terms: JobTerms, config: CoordinatorConfig, *, now: UnixMilliseconds
) -> JobRefused | None:
    """What is wrong with a request in itself."""
    if terms.deadline <= now:
        late = f"the deadline passed {now - terms.deadline} ms ago"
        return refused(terms, RefusalReason.DEADLINE_PASSED, late)
    fault = None
    if terms.deadline > now + config.longest_job_ms:
        fault = f"the deadline is more than {config.longest_job_ms} ms away"
    elif terms.output_limit == 0:
        fault = "a job without output is no job"
    elif terms.input_estimate > terms.input_limit or terms.output_estimate > terms.output_limit:
        fault = "an estimate is above its limit"
    return refused(terms, RefusalReason.INVALID, fault) if fault else None


def candidates(request: JobRequest, market: Market) -> dict[PeerId, ModelOffer] | JobRefused:
    """The live providers that could do the job by what they announce; if none, why not."""
    terms = request.terms
    if not market.is_announced(terms.model):
        return refused(
            terms, RefusalReason.UNKNOWN_MODEL, f"no provider in the network serves {terms.model}"
        )
    sellers = market.sellers(terms.model)
    if not sellers:
        draining = f"every provider of {terms.model} is draining"
        return refused(terms, RefusalReason.NO_BIDS, draining, retry_after_ms=_SOON)
    able = {
        peer: offer
        for peer, offer in sellers.items()
        if terms.kind in offer.kinds and terms.model_digest in (None, offer.digest)
    }
    if not able:
        what = f"no provider of {terms.model} serves it for {terms.kind} with that digest"
        return refused(terms, RefusalReason.NOBODY_ELIGIBLE, what)
    return _allowed(request, able)


def _allowed(
    request: JobRequest, able: dict[PeerId, ModelOffer]
) -> dict[PeerId, ModelOffer] | JobRefused:
    allow = None if request.allow is None else set(request.allow)
    deny = set(request.deny)
    wanted = {
        peer: offer
        for peer, offer in able.items()
        if (allow is None or peer in allow) and peer not in deny
    }
    if wanted:
        return wanted
    return refused(
        request.terms,
        RefusalReason.NOBODY_ELIGIBLE,
        f"your allow and deny lists leave none of the {len(able)} providers of this model",
    )


def no_winner(terms: JobTerms, result: AuctionResult, passes: Sequence[PassReason]) -> JobRefused:
    """An auction without a winner: nobody bid, or nobody who did was eligible."""
    losses = result.loss_counts()
    bids = losses.total() - losses[LossReason.PASSED]
    if not bids and not passes:
        return refused(
            terms, RefusalReason.NO_BIDS, "no provider answered in time", retry_after_ms=_SOON
        )
    if not bids:
        reasons = sorted({reason.value for reason in passes})
        return refused(
            terms,
            RefusalReason.NO_BIDS,
            f"{len(passes)} providers declined: {', '.join(reasons)}",
            retry_after_ms=_SOON if {PassReason.FULL, PassReason.DRAINING} & set(passes) else None,
        )
    named = ", ".join(
        f"{count} {reason.value}"
        for reason, count in sorted(losses.items())
        if count and reason is not LossReason.PASSED
    )
    return refused(
        terms,
        RefusalReason.NOBODY_ELIGIBLE,
        f"none of {bids} bids could be taken: {named}",
        retry_after_ms=_SOON if losses[LossReason.FULL] else None,
    )
