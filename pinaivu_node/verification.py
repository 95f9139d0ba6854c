"""Checks a receipt with nothing but bytes: who signed what, how much, and whether the auction held.

Pure.  Every check is named, so that a reader sees what was established and what was not.  Nothing
that the coordinator computed is taken over: counts, bill, root, winner and price are done again.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from enum import Enum

from pinaivu_node.coordinator.auction import AuctionResult, decide, open_bid_set_untrusted
from pinaivu_node.coordinator.job import hold_for
from pinaivu_node.coordinator.settlement import vouchered_output
from pinaivu_node.protocol.answer import digest_of_answers
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import MILLION, Digest, PeerId, RequestId, digest_of
from pinaivu_node.protocol.inference import ToolCall
from pinaivu_node.protocol.market import AuctionRecord, Bid, Delivery, Outcome, Proof, SegmentReport
from pinaivu_node.protocol.merkle import tree_root
from pinaivu_node.protocol.money import cost
from pinaivu_node.protocol.receipt import Receipt, ReceiptSegment
from pinaivu_node.protocol.signing import Envelope, open_untrusted
from pinaivu_node.protocol.wire import encode_body


class Verdict(Enum):
    """What a check established."""

    HOLDS = "holds"
    FAILS = "fails"
    UNCHECKED = "unchecked"
    """What it takes was not handed over; the detail says what to give."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a verification."""

    name: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that was handed over about one request; nothing in it is believed yet."""

    receipt: Envelope
    proofs: tuple[Envelope, ...] = ()
    delivery: Envelope | None = None
    leaves: tuple[bytes, ...] | None = None
    """The bid set; None if it was not handed over."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the verifier knew beforehand, from elsewhere than the evidence."""

    request_id: RequestId | None = None
    coordinator: PeerId | None = None
    answers: tuple[str, ...] = ()
    """The text that the client received; all of them, in their order, if it asked for several."""
    calls: tuple[ToolCall, ...] = ()
    """The tool calls that it received beside the text of the first."""


def verify(evidence: Evidence, expectation: Expectation) -> Iterator[Check]:
    """Check everything that can be; the first check to fail may end it, when nothing after it
    could mean anything.
    """
    signer = expectation.coordinator or evidence.receipt.signer
    try:
        receipt = open_untrusted(evidence.receipt, Receipt, signer=signer)
    except RemoteProtocolError as exc:
        yield Check("receipt signature", Verdict.FAILS, str(exc))
        return
    yield _signer(receipt, expectation)
    yield from _identity(receipt, expectation)
    delivery = yield from _delivery(receipt, evidence)
    proofs = yield from _proofs(receipt, evidence)
    yield from _counts(receipt, delivery, proofs)
    yield _amounts(receipt)
    yield from _answer(receipt, delivery, expectation)
    yield from _auction(receipt, evidence)
    yield _attestation(receipt)


def _holds(name: str, condition: bool, detail: str) -> Check:  # noqa: FBT001 - the condition is the point
    return Check(name, Verdict.HOLDS if condition else Verdict.FAILS, detail)


def _signer(receipt: Receipt, expectation: Expectation) -> Check:
    if expectation.coordinator is None:
        return Check(
            "receipt signature",
            Verdict.UNCHECKED,
            f"signed by {receipt.coordinator}, whom you did not name: give --coordinator",
        )
    return Check("receipt signature", Verdict.HOLDS, f"signed by {receipt.coordinator}")


def _identity(receipt: Receipt, expectation: Expectation) -> Iterator[Check]:
    if expectation.request_id is not None:
        same = receipt.request_id == expectation.request_id
        yield _holds("request id", same, f"the receipt is about {receipt.request_id}")
    if expectation.coordinator is not None:
        same = receipt.coordinator == expectation.coordinator
        yield _holds("coordinator", same, f"the receipt names {receipt.coordinator}")


def _delivery(receipt: Receipt, evidence: Evidence) -> Generator[Check, None, Delivery | None]:
    """Yields its check and returns the Delivery, or None."""
    if receipt.delivery is None:
        yield Check("delivery", Verdict.HOLDS, "the gateway sent none, and the receipt says so")
        return None
    if evidence.delivery is None:
        yield Check("delivery", Verdict.UNCHECKED, "the signed delivery was not handed over")
        return None
    try:
        delivery = open_untrusted(evidence.delivery, Delivery, signer=receipt.gateway)
    except RemoteProtocolError as exc:
        yield Check("delivery", Verdict.FAILS, str(exc))
        return None
    same = evidence.delivery.digest == receipt.delivery
    yield _holds("delivery", same, f"signed by the gateway {receipt.gateway}")
    return delivery if same else None


def _proofs(receipt: Receipt, evidence: Evidence) -> Generator[Check, None, dict[Digest, Proof]]:
    """Yields a check per proven segment and returns the proofs by digest."""
    by_digest = {envelope.digest: envelope for envelope in evidence.proofs}
    proofs: dict[Digest, Proof] = {}
    for segment in receipt.segments:
        if segment.proof is None:
            continue
        envelope = by_digest.get(segment.proof)
        if envelope is None:
            yield Check("proof", Verdict.UNCHECKED, f"that of {segment.provider} is missing")
            continue
        try:
            proof = open_untrusted(envelope, Proof, signer=segment.provider)
        except RemoteProtocolError as exc:
            yield Check("proof", Verdict.FAILS, str(exc))
            continue
        proofs[segment.proof] = proof
        same = (proof.request_id, proof.gateway) == (receipt.request_id, receipt.gateway)
        yield _holds("proof", same, f"signed by the provider {segment.provider}")
    return proofs


def _counts(
    receipt: Receipt, delivery: Delivery | None, proofs: dict[Digest, Proof]
) -> Iterator[Check]:
    """Every token billed was signed for, by the gateway at least."""
    if receipt.outcome is Outcome.COMPLETED and receipt.delivery is None:
        yield Check("outcome", Verdict.FAILS, "completed, and no gateway says so")
    reports = {report.provider: report for report in delivery.segments} if delivery else {}
    for segment in receipt.segments:
        proof = proofs.get(segment.proof) if segment.proof else None
        yield _count(receipt, segment, reports.get(segment.provider), proof)


def _count(
    receipt: Receipt, segment: ReceiptSegment, report: SegmentReport | None, proof: Proof | None
) -> Check:
    billed = segment.usage
    text = f"{billed.prompt} prompt, {billed.output} output"
    if report is None and proof is None:
        named = receipt.delivery is not None or segment.proof is not None
        if named or not billed.prompt + billed.output:
            return Check("token counts", Verdict.UNCHECKED, f"{text}: nothing to compare with")
        return Check("token counts", Verdict.FAILS, f"{text}, for which nobody signed")
    # Signing a voucher admits its tokens, even to a gateway that reports fewer or nothing at all.
    vouchered = vouchered_output(proof) if proof else 0
    admitted = max(report.usage.output if report else 0, vouchered)
    most_output = min(admitted, proof.usage.output) if proof else admitted
    most_prompt = min(claim.usage.prompt for claim in (report, proof) if claim is not None)
    within = billed.prompt <= most_prompt and billed.output <= most_output
    if report is None:
        who = "as far as the gateway's vouchers go"
    elif proof is None:
        who = "admitted by the gateway"
    else:
        same = report.usage == proof.usage
        who = "signed by provider and gateway" if same else "the smaller of two signed counts"
    return _holds("token counts", within, f"{text}; {who}")


def _amounts(receipt: Receipt) -> Check:
    total = 0
    for segment in receipt.segments:
        due = cost(segment.usage, segment.prices, uplift_ppm=segment.uplift_ppm)
        if segment.amount > due:
            return Check(
                "bill", Verdict.FAILS, f"{segment.amount} NanoX is asked where {due} is due"
            )
        total += segment.amount
    same = total == receipt.amount and receipt.fee <= receipt.amount
    return _holds("bill", same, f"{receipt.amount:,} NanoX, of which {receipt.fee:,} fee")


def _answer(
    receipt: Receipt, delivery: Delivery | None, expectation: Expectation
) -> Iterator[Check]:
    if delivery is not None:
        same = delivery.output_hash == receipt.output_hash
        yield _holds("output hash", same, "the gateway delivered what the receipt names")
    if expectation.answers:
        first, *others = expectation.answers
        said = [(first, expectation.calls), *((text, ()) for text in others)]
        same = digest_of_answers(said) == receipt.output_hash
        yield _holds("answer", same, "the text you hold, by its hash")


def _auction(receipt: Receipt, evidence: Evidence) -> Iterator[Check]:
    if evidence.leaves is None:
        yield Check("bid set", Verdict.UNCHECKED, "it was not handed over")
        return
    root = tree_root(evidence.leaves)
    yield _holds("bid set", root == receipt.bid_set_root, f"{len(evidence.leaves) - 1} answers")
    if root != receipt.bid_set_root:
        return
    try:
        record, answers = open_bid_set_untrusted(evidence.leaves)
    except RemoteProtocolError as exc:
        yield Check("bids", Verdict.FAILS, str(exc))
        return
    yield _same_job(receipt, record)
    policy = digest_of(encode_body(record.policy)) == receipt.policy_hash
    yield _holds("policy", policy, "the auction's parameters are those the receipt names")
    bids = sum(isinstance(answer.message, Bid) for answer in answers)
    counted = (bids, len(answers) - bids) == (receipt.bids, receipt.passes)
    yield _holds("bids", counted, f"{bids} bids and {len(answers) - bids} passes, each signed")
    yield from _replayed(receipt, decide(record, answers))
    yield _limits(receipt, record)
    fee = -(-receipt.amount * record.policy.fee_ppm // MILLION)
    yield _holds("fee", receipt.fee <= fee, f"{record.policy.fee_ppm / 10_000:g} % by the policy")


def _limits(receipt: Receipt, record: AuctionRecord) -> Check:
    """Nothing is billed beyond what the job allowed, nor beyond the hold made for it."""
    terms, delivered, within = record.terms, 0, True
    for segment in receipt.segments:
        # A provider that goes on after another is given what was delivered before as its prompt.
        within = within and segment.usage.prompt <= terms.input_limit + delivered
        delivered += segment.usage.output
    hold = hold_for(terms, record.policy)
    providers = [segment.provider for segment in receipt.segments]
    within = (
        within
        and delivered <= terms.output_limit
        and receipt.amount <= hold
        and len(set(providers)) == len(providers)
    )
    return _holds("limits", within, f"at most {terms.output_limit} output, {hold:,} NanoX held")


def _same_job(receipt: Receipt, record: AuctionRecord) -> Check:
    terms = record.terms
    same = (
        (terms.request_id, terms.model, terms.kind, record.gateway, record.coordinator)
        == (receipt.request_id, receipt.model, receipt.kind_of_job, receipt.gateway,
            receipt.coordinator)
        and terms.sampling_digest == receipt.sampling_digest
        and terms.input_commitment == receipt.input_commitment
    )  # fmt: skip
    return _holds("job terms", same, f"{receipt.model}, the same job in auction and receipt")


def _replayed(receipt: Receipt, result: AuctionResult) -> Iterator[Check]:
    ranked = {award.provider: award for award in result.awards}
    first = result.awards[0].provider if result.awards else None
    yield _holds("winner", first == receipt.provider, f"the auction, replayed, gives {first}")
    for segment in receipt.segments:
        award = ranked.get(segment.provider)
        if award is None:
            yield Check("price", Verdict.FAILS, f"{segment.provider} was never awarded the job")
            continue
        same = (award.prices, award.uplift_ppm, award.model_digest) == (
            segment.prices,
            segment.uplift_ppm,
            segment.model_digest,
        )
        yield _holds(
            "price", same, f"second price: {award.uplift_ppm / 10_000:g} % over the provider's list"
        )


def _attestation(receipt: Receipt) -> Check:
    if receipt.attestation is None:
        return Check("attestation", Verdict.UNCHECKED, "the coordinator runs unattested")
    return Check("attestation", Verdict.UNCHECKED, f"document {receipt.attestation}")
