"""What the coordinator has done since it started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from pinaivu_node.coordinator.store import StoreStatistics
from pinaivu_node.protocol.market import Outcome, RefusalReason, Role


@dataclass(frozen=True, slots=True)
class CoordinatorStatistics:
    """One look at the coordinator; counts only grow, except those of who is here now."""

    peers: Mapping[Role, int]
    running_auctions: int
    open_jobs: int
    requests: int
    awards: int
    refusals: Mapping[RefusalReason, int]
    bids: int
    passes: int
    settlements: Mapping[Outcome, int]
    messages_received: int
    messages_ignored: int
    """Late, repeated or meant for another life; see the log at debug level."""
    roster_left_out: int
    award_ms_total: int
    """JobRequest to Award, summed over all awards."""
    award_ms_slowest: int
    store: StoreStatistics


@dataclass(slots=True)
class Tally:
    """The counters themselves, shared by the coordinator's parts."""

    requests: int = 0
    awards: int = 0
    refusals: Counter[RefusalReason] = field(default_factory=Counter)
    bids: int = 0
    passes: int = 0
    settlements: Counter[Outcome] = field(default_factory=Counter)
    messages_received: int = 0
    messages_ignored: int = 0
    award_ms_total: int = 0
    award_ms_slowest: int = 0

    def award(self, took_ms: int) -> None:
        """An Award was sent this long after its JobRequest."""
        self.awards += 1
        self.award_ms_total += took_ms
        self.award_ms_slowest = max(self.award_ms_slowest, took_ms)
