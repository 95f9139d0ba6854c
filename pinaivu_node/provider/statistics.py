"""What a provider did since it was started, for whoever looks: screen, status command, metrics."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from pinaivu_node.engine.fleet.residency import Standing
from pinaivu_node.protocol.ids import ModelName, NanoX, PeerId, RequestId
from pinaivu_node.protocol.inference import Finish, RefuseReason
from pinaivu_node.protocol.market import PassReason

_LAST_JOBS: Final = 20
"""What a screen shows at most."""


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """One model for sale."""

    model: ModelName
    ready: bool
    running: int
    capacity: int
    device: str
    tokens_per_second: float
    """Of one generation, as the engine measured it."""
    kv_blocks: int = 0
    kv_blocks_free: int = 0
    """0 of 0 where an engine does not say."""
    input_tokens: int = 0
    """Prompt tokens that the engine was given since it was started."""
    cached_tokens: int = 0
    """Of these, what its prefix cache had."""
    warm_prefixes: int = 0
    """Beginnings of prompts that are remembered, for bids to go by."""
    load_progress: float = 1.0
    standing: Standing | None = None
    """Where the model is, if it is loaded on demand."""


@dataclass(frozen=True, slots=True)
class RunningJob:
    """One job at work."""

    request_id: RequestId
    model: ModelName
    gateway: PeerId
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """One job that is over; `paid` is None until its receipt comes."""

    request_id: RequestId
    model: ModelName
    tokens: int
    finish: Finish
    paid: NanoX | None = None


@dataclass(frozen=True, slots=True)
class ProviderStatistics:
    """A snapshot; counters only grow."""

    peer_id: PeerId
    coordinator: PeerId
    connected: bool
    """Whether the coordinator has welcomed us and the session lives."""
    draining: bool
    models: tuple[ModelStatistics, ...]
    running: tuple[RunningJob, ...]
    last_jobs: tuple[FinishedJob, ...]
    """Newest first."""
    offers: int
    """Verified offers heard, answered or not."""
    bids: int
    won: int
    """Jobs accepted.  A bid that was not won may still be a standby's."""
    finished: int
    passes: Mapping[PassReason, int]
    refusals: Mapping[RefuseReason, int]
    rejected_messages: int
    """Gossip that was not the coordinator's, or could not be understood."""
    tokens_served: int
    earnings: NanoX
    """By receipts that came since the start."""
    unpaid_proofs: int
    gateways: int
    """Gateways with an inference stream open."""


@dataclass(slots=True)
class Tally:
    """The counters behind a snapshot; whoever does the thing counts it."""

    offers: int = 0
    bids: int = 0
    won: int = 0
    finished: int = 0
    rejected_messages: int = 0
    tokens_of_finished: int = 0
    earnings: int = 0
    passes: Counter[PassReason] = field(default_factory=Counter)
    refusals: Counter[RefuseReason] = field(default_factory=Counter)
    last_jobs: OrderedDict[RequestId, FinishedJob] = field(default_factory=OrderedDict)

    def finish(self, job: FinishedJob) -> None:
        """A job is over."""
        self.finished += 1
        self.tokens_of_finished += job.tokens
        self.last_jobs[job.request_id] = job
        if len(self.last_jobs) > _LAST_JOBS:
            self.last_jobs.popitem(last=False)

    def earn(self, request_id: RequestId, amount: NanoX) -> None:
        """A job was paid."""
        self.earnings += amount
        if (job := self.last_jobs.get(request_id)) is not None:
            self.last_jobs[request_id] = replace(job, paid=amount)
