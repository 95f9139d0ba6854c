"""One model's place in a fleet: whether it is in memory, and what was learnt of it so far.

Nothing here awaits or decides; `fleet.py` does both.  Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Final

import trio

from pinaivu_node.engine.fleet.residency import Residence, Tenant
from pinaivu_node.engine.types import Engine, EngineStatistics

_MAX_RETRY_PAUSE_S: Final = 960.0
_BARELY_STARTED: Final = 0.05
"""Progress under which it says nothing about how long the rest takes."""
_NEARLY: Final = 0.1
"""Of the expected time that is taken to remain when a load takes longer than expected."""


@dataclass(frozen=True, slots=True)
class FleetModel:
    """One model that a fleet can run."""

    name: str
    open: Callable[[], AbstractAsyncContextManager[Engine]]
    """Begin to load it; leaving the context ends its engine and frees its memory."""
    need: int
    """Bytes in memory, estimated."""
    spare: int = 0
    """Of these, what a fresh engine has reserved and not touched yet."""
    load_s: float = 10.0
    """Seconds to load it, estimated; what was measured counts from the first time on."""
    context_window: int = 0
    """What is said of it until it was loaded once."""


class Life:
    """One stay of a model in memory, from the decision to load it until its engine is gone."""

    def __init__(self, *, announced: bool) -> None:
        self.announced = announced
        """Whether the model is for sale while it is loaded."""
        self.turn = trio.Event()
        """Those before it are loaded."""
        self.began: float | None = None
        self.opened: Engine | None = None
        self.engine: Engine | None = None
        """The same, once the model is loaded."""
        self.failure: str | None = None
        self.settled = trio.Event()
        """Loaded or failed."""
        self.leave = trio.Event()
        self.gone = trio.Event()

    @property
    def progress(self) -> float:
        """How much of the load is done, 0 where the engine does not say."""
        if self.opened is None:
            return 0.0
        said = self.opened.statistics().load_progress
        # An engine that has no notion of it says 1 all the while.
        return said if self.engine is not None or said < 1.0 else 0.0


class Berth:
    """The account of one model."""

    def __init__(self, model: FleetModel) -> None:
        self.model = model
        self.need = model.need
        self.calls = 0
        """Requests that run in it or wait for it."""
        self.waiting = 0
        """Of these, those that wait for it to be loaded."""
        self.last_used = 0.0
        self.life: Life | None = None
        self.failure: str | None = None
        """Why the last load failed, while no other try is made."""
        self.pause_s = 0.0
        """Before the next try, if the last one failed."""
        self.first_token_ms = 0
        """What the loaded and idle engine expects a first token to take."""
        self._load_s = model.load_s
        self._known = _unknown(model.context_window)
        """What the engine said last, for when it is gone."""
        self._earlier: EngineStatistics | None = None
        """The same when its last life ended: counters go on from there."""

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

    @property
    def residence(self) -> Residence:
        """Where the model is."""
        if self.life is not None:
            return Residence.LOADING if self.life.engine is None else Residence.WARM
        return Residence.COLD if self.failure is None else Residence.FAILED

    def tenant(self) -> Tenant:
        """What decides whether it stays."""
        return Tenant(
            name=self.name,
            need=self.need,
            residence=self.residence,
            calls=self.calls,
            last_used=self.last_used,
        )

    def statistics(self) -> EngineStatistics:
        """What its engine says now or, when it has none, said last; counters only grow."""
        if self.life is not None and self.life.engine is not None:
            said = self.life.engine.statistics()
            if not said.running and not said.queued:
                self.first_token_ms = said.ttft_estimate_ms
            self._known = _continued(said, self._earlier)
        return self._known

    def remaining_s(self, *, now: float) -> float:
        """How long loading it would take from now on, were it the only one."""
        life = self.life
        if life is None or life.began is None:
            return self._load_s
        if life.engine is not None:
            return 0.0
        elapsed, progress = now - life.began, life.progress
        if progress > _BARELY_STARTED:
            return elapsed * (1 - progress) / progress
        return max(self._load_s - elapsed, _NEARLY * self._load_s)

    # --- what happens to it -----------------------------------------------------------------------

    def loaded(self, engine: Engine, *, now: float) -> None:
        """The model is in memory."""
        if self.life is None or self.life.began is None:
            raise ValueError(f"nobody was loading {self.name}")
        self.life.engine = engine
        self._load_s = now - self.life.began
        self.last_used = now
        self.pause_s = 0.0
        self.statistics()

    def failed(self, reason: str, *, first_pause_s: float) -> None:
        """The model could not be loaded."""
        if self.life is not None:
            self.life.failure = reason
        self.life = None
        self.failure = reason
        self.pause_s = min(2 * self.pause_s or first_pause_s, _MAX_RETRY_PAUSE_S)

    def left(self) -> Life | None:
        """It is sent away: the life that the caller is to end.

        The next one counts as a restart: whatever its engine kept of prompts is lost with it.
        """
        said = self.statistics()
        self._earlier = self._known = replace(said, restarts=said.restarts + 1)
        life, self.life = self.life, None
        return life

    def measured(self, size: int, *, fresh: bool, budget: int | None) -> None:
        """Note what its engine takes now.

        Fresh from the disk it may turn out to need less than was thought; later only more, because
        what an idle engine does not touch it may touch again.  What it has not touched yet does not
        make a model too large that runs.
        """
        if not fresh:
            self.need = max(self.need, size)
        elif budget is None:
            self.need = size + self.model.spare
        else:
            self.need = max(size, min(size + self.model.spare, budget))


def _unknown(context_window: int) -> EngineStatistics:
    """What is said of a model that was never loaded here: one request at a time, until we know."""
    return EngineStatistics(
        ready=True,
        running=0,
        queued=0,
        capacity=1,
        context_window=context_window,
        tokens_per_second=0.0,
        ttft_estimate_ms=0,
        restarts=0,
        generated_tokens=0,
        device="",
        dtype="",
    )


def _continued(now: EngineStatistics, earlier: EngineStatistics | None) -> EngineStatistics:
    """An engine's statistics, with counters that go on from its earlier lives."""
    if earlier is None:
        return now
    return replace(
        now,
        restarts=now.restarts + earlier.restarts,
        generated_tokens=now.generated_tokens + earlier.generated_tokens,
        input_tokens=now.input_tokens + earlier.input_tokens,
        cached_tokens=now.cached_tokens + earlier.cached_tokens,
        preemptions=now.preemptions + earlier.preemptions,
    )
