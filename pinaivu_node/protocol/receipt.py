"""What is written once about every job, and can be checked by anyone for ever."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from pinaivu_node.protocol.ids import (
    MAX_SAFE_INTEGER,
    DigestField,
    MillisecondsField,
    ModelNameField,
    NanoXField,
    PartsPerMillionField,
    PeerIdField,
    RequestIdField,
    UnixMillisecondsField,
)
from pinaivu_node.protocol.market import Count, JobKindField, Outcome, SegmentOutcome
from pinaivu_node.protocol.money import PriceList, TokenUsage
from pinaivu_node.protocol.signing import Envelope
from pinaivu_node.protocol.wire import Message, Record, Word

MAX_LEAVES: Final = 2049
"""The auction record and two thousand answers: more than fit a frame."""
MAX_LEAF_BYTES: Final = 1 << 20
"""As much as any message: an auction record holds a measurement per bidder."""


class ReceiptSegment(Record):
    """One provider's part of the job, as billed."""

    provider: PeerIdField
    model_digest: DigestField
    usage: TokenUsage
    """The smaller count of proof and delivery, kind by kind."""
    prices: PriceList
    uplift_ppm: PartsPerMillionField
    amount: NanoXField
    """What the gateway paid for it; the provider got this less the fee."""
    outcome: Word[SegmentOutcome]
    output_hash: DigestField
    ttft_ms: MillisecondsField | None
    duration_ms: MillisecondsField
    proof: DigestField | None
    """Digest of the provider's signed Proof; None if it never sent one."""


class Receipt(Message, kind="receipt/1"):
    """Signed by the coordinator, once per request id."""

    request_id: RequestIdField
    coordinator: PeerIdField
    gateway: PeerIdField
    provider: PeerIdField
    """The auction's winner; who really served is in `segments`."""
    kind_of_job: JobKindField
    model: ModelNameField
    model_digest: DigestField
    sampling_digest: DigestField
    input_commitment: DigestField
    output_hash: DigestField
    bid_set_root: DigestField
    bids: Count
    passes: Count
    policy_hash: DigestField
    segments: Annotated[tuple[ReceiptSegment, ...], Field(fail_fast=True, max_length=16)]
    amount: NanoXField
    fee: NanoXField
    """Kept by the network, out of `amount`."""
    outcome: Word[Outcome]
    opened_at: UnixMillisecondsField
    awarded_at: UnixMillisecondsField
    settled_at: UnixMillisecondsField
    ledger_entry: Annotated[int, Field(ge=1, le=MAX_SAFE_INTEGER)]
    delivery: DigestField | None
    """Digest of the gateway's signed Delivery; None if it never sent one."""
    attestation: DigestField | None
    """Digest of the coordinator's attestation document; None: it runs unattested."""


class ReceiptRequest(Message, kind="receipt_request/1"):
    """On the log protocol: what is known of this request?"""

    request_id: RequestIdField


class ReceiptReply(Message, kind="receipt_reply/1"):
    """The receipt with the two statements it was made from; all None while there is none."""

    request_id: RequestIdField
    receipt: Envelope | None
    proofs: Annotated[tuple[Envelope, ...], Field(fail_fast=True, max_length=16)] = ()
    delivery: Envelope | None = None


class BidSetRequest(Message, kind="bid_set_request/1"):
    """On the log protocol: who answered the offer, and what decided?"""

    request_id: RequestIdField


class BidSetReply(Message, kind="bid_set_reply/1"):
    """The leaves under `bid_set_root`, byte for byte; None before the close or if unknown.

    The first is the body of an AuctionRecord, the others are bodies of AnswerRecords.
    """

    request_id: RequestIdField
    leaves: (
        Annotated[
            tuple[Annotated[bytes, Field(max_length=MAX_LEAF_BYTES)], ...],
            Field(fail_fast=True, max_length=MAX_LEAVES),
        ]
        | None
    )


TO_LOG: Final = (ReceiptRequest, BidSetRequest)
FROM_LOG: Final = (ReceiptReply, BidSetReply)
