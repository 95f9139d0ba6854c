"""Everyone ↔ coordinator: presence, jobs, bids, awards, proofs, deliveries, receipts.

Unsigned messages are believed because the transport proved who sent them and they concern only
their sender.  What a third party must be able to check later travels in an `Envelope`: JobOffer,
Bid, Pass, DispatchToken, Proof, Delivery, Receipt, Voucher.

The longest story: provider and gateway say Hello and are answered Welcome; the provider Announces;
both exchange Heartbeats; the gateway sends a JobRequest; the coordinator gossips a JobOffer; the
providers answer Bid or Pass; the gateway gets an Award or a JobRefused; after the stream the
provider sends its Proof and the gateway its Delivery, again and again until the Receipt comes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field

from pinaivu_node.protocol.ids import (
    MAX_SAFE_INTEGER,
    DigestField,
    Milliseconds,
    MillisecondsField,
    ModelNameField,
    NanoXField,
    PartsPerMillionField,
    PeerIdField,
    RequestIdField,
    TokenCount,
    UnixMillisecondsField,
)
from pinaivu_node.protocol.money import PriceList, TokenUsage
from pinaivu_node.protocol.signing import Envelope
from pinaivu_node.protocol.wire import Message, Record, Word

NO_DELAY: Final = Milliseconds(0)
MAX_MODELS: Final = 64
"""Models per provider: a box that serves more announces the ones it wants to sell."""
MAX_PEER_LIST: Final = 1024
"""Entries of an allow or deny list, or of a roster page: about 100 KiB on the wire."""
MAX_FINGERPRINTS: Final = 256
"""Turns of a conversation that are fingerprinted; older ones lie under the newest anyway."""

Multiaddress = Annotated[str, Field(max_length=256)]
Multiaddresses = Annotated[tuple[Multiaddress, ...], Field(fail_fast=True, max_length=8)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Fingerprint = Annotated[bytes, Field(min_length=16, max_length=16)]
Hash32 = Annotated[bytes, Field(min_length=32, max_length=32)]
Explanation = Annotated[str, Field(max_length=300)]


class Role(StrEnum):
    """What a peer is in the market."""

    PROVIDER = "provider"
    GATEWAY = "gateway"


class JobKind(StrEnum):
    """What is asked of the model."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    """Announced by who serves an encoder, which does nothing else."""


class Preference(StrEnum):
    """What the client minds most; the policy turns it into a value of time."""

    PRICE = "price"
    BALANCED = "balanced"
    LATENCY = "latency"


class PassReason(StrEnum):
    """Why a provider does not bid."""

    FULL = "full"
    DRAINING = "draining"
    NOT_SERVED = "not_served"
    PRICE_TOO_LOW = "price_too_low"
    CONTEXT_TOO_SMALL = "context_too_small"
    ENGINE_UNAVAILABLE = "engine_unavailable"


class RefusalReason(StrEnum):
    """Why the coordinator holds no auction, or the auction has no winner."""

    UNKNOWN_MODEL = "unknown_model"
    NO_BIDS = "no_bids"
    NOBODY_ELIGIBLE = "nobody_eligible"
    NO_CREDIT = "no_credit"
    DUPLICATE = "duplicate"
    OVERLOADED = "overloaded"
    INVALID = "invalid"
    DEADLINE_PASSED = "deadline_passed"


class Outcome(StrEnum):
    """How a job ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    """The client left; what was delivered is paid."""
    FAILED = "failed"
    """No provider finished it; what was delivered is paid."""
    ABANDONED = "abandoned"
    """The gateway never said what it received; vouchers alone are paid."""


class SegmentOutcome(StrEnum):
    """How one provider's part of a job ended, as its gateway saw it."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    DIED = "died"
    STALLED = "stalled"
    ERROR = "error"


RoleField = Word[Role]
JobKindField = Word[JobKind]
PreferenceField = Word[Preference]


# --- presence -------------------------------------------------------------------------------------


class Hello(Message, kind="hello/1"):
    """The first message of a peer on its market stream, and again after every reconnection."""

    role: RoleField
    addresses: Multiaddresses
    software: Annotated[str, Field(max_length=64)]
    incarnation: Annotated[bytes, Field(max_length=16)] = b""
    """Random, drawn when the process starts: it tells a restart, which forgot its running jobs,
    from a reconnection, which did not."""


class AuctionPolicy(Record):
    """Every number that decides an auction; its digest is in every token and receipt."""

    window_ms: MillisecondsField
    """The latest close.  400 ms: gossip across continents takes about 300 ms."""
    grace_ms: MillisecondsField
    """After `enough_bids`, how long the rest may still take."""
    enough_bids: Annotated[int, Field(ge=1, le=10_000)]
    bid_target: Annotated[int, Field(ge=1, le=10_000)]
    """About how many providers an offer's threshold lets through."""
    standbys: Annotated[int, Field(ge=0, le=2)]
    price_ceiling: PriceList
    """The reserve where the client names none."""
    time_value_price: NanoXField
    time_value_balanced: NanoXField
    time_value_latency: NanoXField
    """NanoX per millisecond of expected time, by preference."""
    prior_ttft_ms: MillisecondsField
    prior_millitokens_per_second: Annotated[int, Field(ge=1, le=10**9)]
    prior_reliability_ppm: PartsPerMillionField
    prior_weight: Annotated[int, Field(ge=1, le=1000)]
    """The prior counts as this many jobs, so a newcomer's first result moves it but a little."""
    fee_ppm: PartsPerMillionField
    token_ttl_ms: MillisecondsField
    """How long after the award a dispatch token may still be used for the first time."""


class Welcome(Message, kind="welcome/1"):
    """The coordinator's answer to Hello."""

    heartbeat_ms: MillisecondsField
    now: UnixMillisecondsField
    """The coordinator's clock; deadlines are read on it."""
    policy: AuctionPolicy
    policy_hash: DigestField
    balance: Annotated[int, Field(ge=-MAX_SAFE_INTEGER, le=MAX_SAFE_INTEGER)]


class ModelOffer(Record):
    """One model that a provider serves now."""

    model: ModelNameField
    digest: DigestField
    context_window: TokenCount
    capacity: Count
    """Generations it runs at once."""
    prices: PriceList
    kinds: Annotated[tuple[JobKindField, ...], Field(fail_fast=True, min_length=1, max_length=8)]
    licence: Annotated[str, Field(max_length=64)]
    owner: Annotated[str, Field(max_length=64)]


class Announce(Message, kind="announce/1"):
    """What a provider serves; replaces what it announced before."""

    models: Annotated[tuple[ModelOffer, ...], Field(fail_fast=True, max_length=MAX_MODELS)]
    draining: bool = False


class ModelLoad(Record):
    """How busy one model of a provider is."""

    model: ModelNameField
    running: Count
    queued: Count


class Heartbeat(Message, kind="heartbeat/1"):
    """Both ways, every `heartbeat_ms`; three missed and the peer is taken for gone."""

    sequence: Annotated[int, Field(ge=0, le=MAX_SAFE_INTEGER)]
    loads: Annotated[tuple[ModelLoad, ...], Field(fail_fast=True, max_length=MAX_MODELS)] = ()


class Drain(Message, kind="drain/1"):
    """A provider stops (or resumes) taking jobs; what runs is finished."""

    draining: bool


class RosterEntry(Record):
    """Someone in the market now, and where to dial them."""

    peer: PeerIdField
    role: RoleField
    addresses: Multiaddresses
    models: Annotated[tuple[ModelOffer, ...], Field(fail_fast=True, max_length=MAX_MODELS)] = ()


class Roster(Message, kind="roster/1"):
    """Who is there: providers are told of gateways, gateways of providers.  Replaces the last."""

    entries: Annotated[tuple[RosterEntry, ...], Field(fail_fast=True, max_length=MAX_PEER_LIST)]


# --- the auction ----------------------------------------------------------------------------------


class JobTerms(Record):
    """What is to be done and on which conditions; the same in request, offer and bid set."""

    request_id: RequestIdField
    kind: JobKindField
    model: ModelNameField
    model_digest: DigestField | None
    """None: whatever digest the winner announces, which token and receipt then name."""
    input_estimate: TokenCount
    input_limit: TokenCount
    """No prompt of this job can have more tokens than this; the hold is made for it."""
    output_estimate: TokenCount
    output_limit: TokenCount
    max_prices: PriceList | None
    """The client's ceiling; None: the policy's."""
    preference: PreferenceField
    sampling_digest: DigestField
    input_commitment: DigestField
    deadline: UnixMillisecondsField
    """When the answer must be whole; nobody works on a job past it."""


class JobRequest(Message, kind="job_request/1"):
    """A gateway wants a job done."""

    terms: JobTerms
    allow: (
        Annotated[tuple[PeerIdField, ...], Field(fail_fast=True, max_length=MAX_PEER_LIST)] | None
    ) = None
    """None: anyone.  An empty list: nobody, which is refused and not ignored."""
    deny: Annotated[tuple[PeerIdField, ...], Field(fail_fast=True, max_length=MAX_PEER_LIST)] = ()
    fingerprints: Annotated[
        tuple[Fingerprint, ...], Field(fail_fast=True, max_length=MAX_FINGERPRINTS)
    ] = ()


class JobOffer(Message, kind="job_offer/1"):
    """Signed, by gossip: the coordinator asks the providers of a model for bids."""

    terms: JobTerms
    gateway: PeerIdField
    fingerprints: Annotated[
        tuple[Fingerprint, ...], Field(fail_fast=True, max_length=MAX_FINGERPRINTS)
    ]
    threshold: Annotated[int, Field(ge=0, le=2**32)]
    """Only providers whose draw for this request is below it may bid; 2³² lets all."""
    closes_at: UnixMillisecondsField


def _is_zero(value: object) -> bool:
    return value == 0


class Bid(Message, kind="bid/1"):
    """Signed: I will do it, at these prices."""

    request_id: RequestIdField
    bidder: PeerIdField
    model_digest: DigestField
    prices: PriceList
    context_window: TokenCount
    warm_tokens: TokenCount
    """Prompt tokens found in the prefix cache by the offer's fingerprints."""
    expires_at: UnixMillisecondsField
    delay_ms: Annotated[MillisecondsField, Field(exclude_if=_is_zero)] = NO_DELAY
    """What has to be done before the job can begin, such as loading the model.  It only counts
    against the bidder, so it is believed; most bids have none and do not say it."""


class Pass(Message, kind="pass/1"):
    """Signed: I will not, and why."""

    request_id: RequestIdField
    bidder: PeerIdField
    reason: Word[PassReason]


class Measurement(Record):
    """What gateways measured of a provider on a model, decayed; the prior where nothing was."""

    ttft_ms: MillisecondsField
    millitokens_per_second: Annotated[int, Field(ge=1, le=10**9)]
    reliability_ppm: PartsPerMillionField
    samples: Count


class AuctionRecord(Message, kind="auction/1"):
    """The first leaf of a bid set: everything but the answers that decided the auction."""

    coordinator: PeerIdField
    gateway: PeerIdField
    terms: JobTerms
    allow: (
        Annotated[tuple[PeerIdField, ...], Field(fail_fast=True, max_length=MAX_PEER_LIST)] | None
    )
    deny: Annotated[tuple[PeerIdField, ...], Field(fail_fast=True, max_length=MAX_PEER_LIST)]
    policy: AuctionPolicy
    opened_at: UnixMillisecondsField
    closed_at: UnixMillisecondsField


class AnswerRecord(Message, kind="answer/1"):
    """Every other leaf: one answer as received, and what was known of its sender."""

    answer: Envelope
    received_at: UnixMillisecondsField
    measurement: Measurement
    banned: bool
    full: bool
    """Known to have no free slot when the auction closed."""


class DispatchToken(Message, kind="dispatch_token/1"):
    """Signed by the coordinator: this provider may run this job for this gateway, once."""

    request_id: RequestIdField
    provider: PeerIdField
    gateway: PeerIdField
    kind_of_job: JobKindField
    model: ModelNameField
    model_digest: DigestField
    rank: Annotated[int, Field(ge=0, le=2)]
    """0: the winner; 1 and 2: standbys."""
    input_limit: TokenCount
    output_limit: TokenCount
    prices: PriceList
    uplift_ppm: PartsPerMillionField
    sampling_digest: DigestField
    input_commitment: DigestField
    bid_set_root: DigestField
    policy_hash: DigestField
    issued_at: UnixMillisecondsField
    expires_at: UnixMillisecondsField
    deadline: UnixMillisecondsField
    delay_ms: Annotated[MillisecondsField, Field(exclude_if=_is_zero)] = NO_DELAY
    """What the provider's bid said it has to do first: so much longer a first token may take."""


class Contact(Record):
    """Where a provider can be dialled."""

    peer: PeerIdField
    addresses: Multiaddresses


class Award(Message, kind="award/1"):
    """The auction's result: tokens in the order in which they are to be tried."""

    request_id: RequestIdField
    tokens: Annotated[tuple[Envelope, ...], Field(fail_fast=True, min_length=1, max_length=3)]
    contacts: Annotated[tuple[Contact, ...], Field(fail_fast=True, min_length=1, max_length=3)]
    bids: Count
    passes: Count
    auction_ms: MillisecondsField


class JobRefused(Message, kind="job_refused/1"):
    """There is no award, and why."""

    request_id: RequestIdField
    reason: Word[RefusalReason]
    explanation: Explanation
    retry_after_ms: MillisecondsField | None = None


# --- settlement -----------------------------------------------------------------------------------


class Voucher(Message, kind="voucher/1"):
    """Signed by the gateway, on the inference stream: I have received this many tokens so far."""

    request_id: RequestIdField
    provider: PeerIdField
    output_tokens: TokenCount


class Proof(Message, kind="proof/1"):
    """Signed by the provider: what I did."""

    request_id: RequestIdField
    provider: PeerIdField
    gateway: PeerIdField
    model_digest: DigestField
    usage: TokenUsage
    output_hash: DigestField
    """Of the UTF-8 text sent."""
    token: DigestField
    """Digest of the dispatch token's envelope."""
    outcome: Word[SegmentOutcome]
    engine_ttft_ms: MillisecondsField
    duration_ms: MillisecondsField
    voucher: Envelope | None
    """The last one received."""


class SegmentReport(Record):
    """What a gateway received from one provider it dispatched to."""

    provider: PeerIdField
    usage: TokenUsage
    output_hash: DigestField
    outcome: Word[SegmentOutcome]
    ttft_ms: MillisecondsField | None
    """Dispatch to first token, on the gateway's clock; None if none came."""
    duration_ms: MillisecondsField


class Delivery(Message, kind="delivery/1"):
    """Signed by the gateway: what I received, in order of dispatch."""

    request_id: RequestIdField
    gateway: PeerIdField
    segments: Annotated[tuple[SegmentReport, ...], Field(fail_fast=True, max_length=16)]
    outcome: Word[Outcome]
    output_hash: DigestField
    """Of the whole text handed to the client."""


class Acknowledge(Message, kind="acknowledge/1"):
    """The coordinator has a Proof or Delivery that no receipt can come of; stop sending it."""

    request_id: RequestIdField
    explanation: Explanation


# What may arrive on a market stream, by who reads it.
TO_COORDINATOR: Final = (Hello, Announce, Heartbeat, Drain, JobRequest, Envelope)
TO_PEER: Final = (Welcome, Heartbeat, Roster, Award, JobRefused, Acknowledge, Envelope)
