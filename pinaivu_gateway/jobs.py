"""What the HTTP side asks of the market, and every way in which it can be refused.

Pure.  `market.py` implements `Market` over the mesh; `app.py` speaks OpenAI's API on top of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from pinaivu_node.protocol.ids import (
    Digest,
    Milliseconds,
    ModelName,
    NanoX,
    PeerId,
    RequestId,
)
from pinaivu_node.protocol.inference import Finish, Prompt, Sampling, TokenLogprob, ToolCallDelta
from pinaivu_node.protocol.market import JobKind, ModelOffer, Preference
from pinaivu_node.protocol.money import NOTHING, PriceList, TokenUsage
from pinaivu_node.protocol.receipt import ReceiptReply
from pinaivu_node.protocol.signing import Envelope


@dataclass(frozen=True, slots=True)
class JobOrder:
    """A job to be bought, as the client asked for it."""

    request_id: RequestId
    kind: JobKind
    model: ModelName
    prompt: Prompt
    sampling: Sampling
    input_limit: int
    """No prompt of this text can have more tokens; the hold is made for it."""
    input_estimate: int
    output_limit: int
    output_estimate: int
    deadline_in: Milliseconds
    preference: Preference = Preference.BALANCED
    max_prices: PriceList | None = None
    allow: tuple[PeerId, ...] | None = None
    deny: tuple[PeerId, ...] = ()
    fingerprints: tuple[bytes, ...] = ()
    tenant: bytes = b""
    model_digest: Digest | None = None
    """The only weights that will do; None: whatever the winner announces."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer.  Text may be empty while a character is held back."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token id, if they were asked for."""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    index: int = 0
    """Which of the answers, if several were asked for."""
    finish: Finish | None = None
    """Of one of several answers, with the last of it."""


@dataclass(frozen=True, slots=True)
class JobFinished:
    """The last event of a job that went well."""

    finish: Finish
    usage: TokenUsage
    cost: NanoX = NOTHING
    """By our own count; the receipt takes the smaller of two."""


JobEvent = TextDelta | JobFinished


class Job(Protocol):
    """A job whose first token has come, so that nothing before it can fail any more."""

    @property
    def provider(self) -> PeerId:
        """Who serves it."""
        ...

    @property
    def model_digest(self) -> Digest:
        """What it says to run, fixed by the dispatch token."""
        ...

    @property
    def failovers(self) -> int:
        """How many providers failed before this one."""
        ...

    def events(self) -> AsyncIterator[JobEvent]:
        """The first token and everything after it; deltas that wait together come as one.

        Raises StreamBroken if the provider is lost or misbehaves from here on.
        """
        ...


@dataclass(frozen=True, slots=True)
class ProviderView:
    """A provider as the coordinator's roster shows it."""

    peer: PeerId
    addresses: tuple[str, ...]
    models: tuple[ModelOffer, ...]
    connected: bool
    """Whether our inference stream to it is open."""


@dataclass(frozen=True, slots=True)
class MarketStatistics:
    """For /health and /metrics; counters only grow."""

    coordinator_connected: bool
    balance: NanoX | int | None
    """As of the last Welcome."""
    jobs_running: int
    jobs_finished: int
    failovers: int
    deliveries_waiting: int
    last_auction_ms: int | None


class Market(Protocol):
    """Buys jobs; one per gateway process."""

    def buy(self, order: JobOrder) -> AbstractAsyncContextManager[Job]:
        """Hold the auction, dispatch, and wait for the first token.

        Raises a JobError on entry.  Leaving the context early cancels the job at the provider and
        reports what was delivered; leaving it in any way ends in a signed Delivery.
        """
        ...

    def providers(self) -> Sequence[ProviderView]:
        """Who is in the market now; empty while the coordinator is unreachable."""
        ...

    async def receipt(self, request_id: RequestId, *, wait_ms: Milliseconds) -> ReceiptReply:
        """The receipt from the coordinator, verified to be signed by it; waits for it that long.

        Its `receipt` is None if there is none (yet).  Raises CoordinatorUnreachable.
        """
        ...

    async def bid_set(self, request_id: RequestId) -> tuple[bytes, ...] | None:
        """The leaves of the bid set, None if unknown.  Raises CoordinatorUnreachable."""
        ...

    def statistics(self) -> MarketStatistics:
        """A snapshot."""
        ...


class DeliveryOutbox(Protocol):
    """Where signed Deliveries wait for their receipts: durable, so that a crash loses none."""

    async def put(self, request_id: RequestId, delivery: Envelope) -> None:
        """Durable when it returns."""
        ...

    async def remove(self, request_id: RequestId) -> None:
        """Its receipt or acknowledgement has come."""
        ...

    async def waiting(self) -> list[tuple[RequestId, Envelope]]:
        """Everything put and not removed, oldest first."""
        ...


class JobError(Exception):
    """The job cannot be done; the message is fit for the client."""

    retry_after_ms: Milliseconds | None = None

    def __init__(self, message: str, *, retry_after_ms: Milliseconds | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class UnknownModel(JobError):
    """No provider in the market serves this model."""


class NoBids(JobError):
    """Providers serve it, and none can take it now."""


class NobodyEligible(JobError):
    """There were bids, and none passes what the client demanded."""


class NoCredit(JobError):
    """The gateway's account cannot cover the hold."""


class Overloaded(JobError):
    """The coordinator takes no more jobs now."""


class JobInvalid(JobError):
    """The coordinator refuses the terms themselves."""


class CoordinatorUnreachable(JobError):
    """No session with the coordinator, or it does not answer."""


class ProvidersFailed(JobError):
    """Winner and standbys all failed before the first token."""


class PromptTooLong(JobError):
    """The model's context window is too small for the prompt, says the engine."""


class PromptNotAccepted(JobError):
    """The model cannot run such a prompt, for example a chat without a chat template."""


class DeadlinePassed(JobError):
    """The answer did not come in the time the client gave."""


class StreamBroken(JobError):
    """The provider was lost after its first token; what came stands."""
