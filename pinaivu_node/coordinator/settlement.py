"""What a job is billed: the smaller of what was proven and what was received.  Pure.

Each party is believed against its own interest only.  The provider's claim is its Proof; the
gateway's is its Delivery, or its last Voucher where that admits more.  With both, the smaller
count of each kind is paid.  With the Delivery alone, what the gateway admits.  With the Proof
alone, the vouchered output and no more prompt than the gateway itself estimated.  Nothing is paid
for a segment without output, for more than the limits, for a provider without a token, or beyond
the hold; and what a bidder claimed to have warm is paid as warm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pinaivu_node.coordinator.auction import RankedAward
from pinaivu_node.coordinator.job import Contract, Job, Signed
from pinaivu_node.coordinator.ledger import Share
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import (
    MILLION,
    Digest,
    NanoX,
    PeerId,
    UnixMilliseconds,
    digest_of,
)
from pinaivu_node.protocol.market import JobTerms, Outcome, Proof, SegmentReport, Voucher
from pinaivu_node.protocol.money import ZERO_USAGE, TokenUsage, cost
from pinaivu_node.protocol.receipt import Receipt, ReceiptSegment
from pinaivu_node.protocol.signing import Envelope, open_untrusted


@dataclass(frozen=True, slots=True)
class Bill:
    """What is paid to whom, and why."""

    segments: tuple[ReceiptSegment, ...]
    amount: NanoX
    shares: tuple[Share, ...]
    outcome: Outcome
    output_hash: Digest
    proofs: tuple[Envelope, ...]
    """What it was made from, as signed."""
    delivery: Envelope | None

    @property
    def fee(self) -> NanoX:
        """What the network keeps of the amount."""
        return NanoX(sum(share.fee for share in self.shares))


@dataclass(frozen=True, slots=True)
class _Part:
    """One provider's part of a job, as its gateway or it itself tells it, or both."""

    award: RankedAward
    report: SegmentReport | None
    proof: Signed[Proof] | None


def bill(job: Job) -> Bill:
    """The bill of a job as it stands; whatever was said of it, at most its hold."""
    contract = job.contract
    segments: list[ReceiptSegment] = []
    delivered = 0
    left = contract.hold
    for part in _parts(job):
        segment = _segment(contract, part, delivered=delivered, left=left)
        segments.append(segment)
        delivered += segment.usage.output
        left = NanoX(left - segment.amount)
    shares = (_share(segment, contract.policy.fee_ppm) for segment in segments)
    return Bill(
        segments=tuple(segments),
        amount=NanoX(contract.hold - left),
        shares=tuple(share for share in shares if share.amount),
        outcome=_outcome(job),
        output_hash=_output_hash(job),
        proofs=tuple(signed.envelope for signed in job.proofs.values()),
        delivery=job.delivery.envelope if job.delivery else None,
    )


def receipt_for(
    contract: Contract,
    bill: Bill,
    *,
    coordinator: PeerId,
    ledger_entry: int,
    now: UnixMilliseconds,
) -> Receipt:
    """What is to be signed and kept for ever."""
    terms, winner = contract.terms, contract.awards[0]
    return Receipt(
        request_id=terms.request_id,
        coordinator=coordinator,
        gateway=contract.gateway,
        provider=winner.provider,
        kind_of_job=terms.kind,
        model=terms.model,
        model_digest=winner.model_digest,
        sampling_digest=terms.sampling_digest,
        input_commitment=terms.input_commitment,
        output_hash=bill.output_hash,
        bid_set_root=contract.bid_set_root,
        bids=contract.bids,
        passes=contract.passes,
        policy_hash=contract.policy_hash,
        segments=bill.segments,
        amount=bill.amount,
        fee=bill.fee,
        outcome=bill.outcome,
        opened_at=contract.opened_at,
        awarded_at=contract.awarded_at,
        settled_at=now,
        ledger_entry=ledger_entry,
        delivery=bill.delivery.digest if bill.delivery else None,
        attestation=None,
    )


def vouchered_output(proof: Proof) -> int:
    """How many tokens the gateway that a proof names has itself signed for; 0 for a bad voucher.

    A bad one is no fault of the provider's that can be proven: it may be passing on what it got.
    """
    if proof.voucher is None:
        return 0
    try:
        voucher = open_untrusted(proof.voucher, Voucher, signer=proof.gateway)
    except RemoteProtocolError:
        return 0
    same = (voucher.request_id, voucher.provider) == (proof.request_id, proof.provider)
    return voucher.output_tokens if same else 0


def billed_usage(
    award: RankedAward,
    terms: JobTerms,
    *,
    report: SegmentReport | None,
    proof: Proof | None,
    delivered: int,
) -> TokenUsage:
    """What one provider is paid for, whose part began after `delivered` tokens of output.

    A function of what the auction decided and what was signed, so anyone can work it out again.
    """
    if report is not None:
        believed = smaller_count(report, proof)
    elif proof is not None:
        believed = vouchered_usage(proof, terms)
    else:
        believed = ZERO_USAGE
    return _held_to(award, _limited(terms, believed, delivered=delivered))


def smaller_count(report: SegmentReport, proof: Proof | None) -> TokenUsage:
    """What provider and gateway both stand by; without a proof, what the gateway admits."""
    if proof is None:
        return report.usage
    admitted = max(report.usage.output, vouchered_output(proof))
    return TokenUsage(
        input=min(proof.usage.input, report.usage.input),
        cached_input=min(proof.usage.cached_input, report.usage.cached_input),
        output=min(proof.usage.output, admitted),
    )


def vouchered_usage(proof: Proof, terms: JobTerms) -> TokenUsage:
    """What is believed of a provider whose gateway never reported its part."""
    estimate = terms.input_estimate
    cached = min(proof.usage.cached_input, estimate)
    return TokenUsage(
        input=min(proof.usage.input, estimate - cached),
        cached_input=cached,
        output=min(proof.usage.output, vouchered_output(proof)),
    )


def _parts(job: Job) -> Iterator[_Part]:
    """Every provider's part: those that the gateway reports, in its order, then other proofs."""
    contract = job.contract
    reports = job.delivery.message.segments if job.delivery else ()
    for report in reports:
        award = contract.award_of(report.provider)
        if award is None:
            continue  # nobody without a token is ever paid
        yield _Part(award, report, job.proofs.get(report.provider))
    reported = {report.provider for report in reports}
    for award in contract.awards:
        signed = job.proofs.get(award.provider)
        if signed is not None and award.provider not in reported:
            yield _Part(award, None, signed)


def _segment(contract: Contract, part: _Part, *, delivered: int, left: NanoX) -> ReceiptSegment:
    award, report = part.award, part.report
    proof = part.proof.message if part.proof else None
    said = report or proof
    assert said is not None  # noqa: S101 - a part is what somebody told
    usage = billed_usage(award, contract.terms, report=report, proof=proof, delivered=delivered)
    due = cost(usage, award.prices, uplift_ppm=award.uplift_ppm) if usage.output else 0
    return ReceiptSegment(
        provider=award.provider,
        model_digest=award.model_digest,
        usage=usage,
        prices=award.prices,
        uplift_ppm=award.uplift_ppm,
        amount=NanoX(min(due, left)),
        outcome=said.outcome,
        output_hash=said.output_hash,
        ttft_ms=report.ttft_ms if report else None,
        duration_ms=said.duration_ms,
        proof=part.proof.envelope.digest if part.proof else None,
    )


def _limited(terms: JobTerms, usage: TokenUsage, *, delivered: int) -> TokenUsage:
    """No more than the job allows; a resumed prompt holds what was delivered before it as well."""
    most_prompt = terms.input_limit + delivered
    cached = min(usage.cached_input, most_prompt)
    return TokenUsage(
        input=min(usage.input, most_prompt - cached),
        cached_input=cached,
        output=min(usage.output, terms.output_limit - delivered),
    )


def _held_to(award: RankedAward, usage: TokenUsage) -> TokenUsage:
    """What a bidder claimed to have warm is paid as warm: the claim helped it win."""
    cold = max(0, min(award.warm_tokens, usage.prompt) - usage.cached_input)
    return TokenUsage(
        input=usage.input - cold, cached_input=usage.cached_input + cold, output=usage.output
    )


def _share(segment: ReceiptSegment, fee_ppm: int) -> Share:
    fee = min(segment.amount, segment.amount * fee_ppm // MILLION)
    return Share(segment.provider, segment.amount, NanoX(fee))


def _outcome(job: Job) -> Outcome:
    if job.delivery is None:
        return Outcome.ABANDONED
    said = job.delivery.message.outcome
    # A gateway that speaks has not abandoned the job, whatever it calls it.
    return Outcome.FAILED if said is Outcome.ABANDONED else said


def _output_hash(job: Job) -> Digest:
    if job.delivery is not None:
        return job.delivery.message.output_hash
    hashes = [signed.message.output_hash for signed in job.proofs.values()]
    return hashes[-1] if hashes else digest_of(b"")
