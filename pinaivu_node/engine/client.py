"""The engine as the daemon holds it: a model in a child process that is watched and restarted.

The model's crashes, its memory and its grip on the interpreter lock stay in the child.  The child
holds the queue of requests; this end counts them and refuses beyond the bound.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.frames import Gauges, Ready
from pinaivu_node.engine.gauge import Occupancy, SpeedGauge, Timing
from pinaivu_node.engine.process import Child
from pinaivu_node.engine.types import (
    EmbeddingRequest,
    Embeddings,
    EngineBusy,
    EngineDead,
    EngineStatistics,
    GenerationRequest,
    PromptRefused,
    TokenEvent,
)

logger = logging.getLogger(__name__)

_MAX_PAUSE_S: Final = 30.0
_STABLE_S: Final = 60.0
"""A child that was ready for so long was well; the pause after its death is the short one again."""
_MAX_INPUTS: Final = 2048
"""As OpenAI's own bound; with vectors of 1,024 components they take 64 MB here."""
_NO_GAUGES: Final = Gauges(0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0)


class _Attempt:
    """One try at getting the model loaded, for those who wait for it."""

    def __init__(self) -> None:
        self.settled = trio.Event()
        self.failure: str | None = None


class ProcessEngine:
    """An `Engine` whose model runs in a child process.  Made by `open_engine`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._gauge = SpeedGauge()
        self._child: Child | None = None
        self._known: Ready | None = None
        """What the last child that loaded said; a restart changes none of it."""
        self._attempt = _Attempt()
        self._restarts = 0
        self._ready_at = math.inf
        self._past = _NO_GAUGES
        """The counters of all children before this one."""
        self._down = "the model is still loading"
        """Why there is no child that could be asked, when there is none."""

    @property
    def pid(self) -> int | None:
        """The child's process id, None between two lives."""
        return None if self._child is None else self._child.pid

    async def wait_ready(self) -> None:
        """Wait until the model is loaded; EngineDead if this attempt to load it fails."""
        attempt = self._attempt
        await attempt.settled.wait()
        if attempt.failure is not None:
            raise EngineDead(attempt.failure)

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[TokenEvent]]:
        """See `Engine.generate`.  Entering waits for one step of the engine at most."""
        child = self._admitted(request.id, places=request.sampling.n)
        now = self._occupancy()
        timing = Timing(
            asked=trio.current_time(),
            waited=not now.has_room,
            answers=request.sampling.n,
            alone=now.is_idle,
            expected_s=self._gauge.expected_s(now),
        )
        call = child.submit(request, timing=timing)
        try:
            await call.wait_accepted()
            yield call
        finally:
            child.abandon(call)

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """See `Engine.embed`.  The vectors have single precision."""
        if not 1 <= len(request.inputs) <= _MAX_INPUTS:
            raise PromptRefused(f"1 to {_MAX_INPUTS} texts can be embedded at once.")
        child = self._admitted(request.id, places=1)
        call = child.submit_embedding(request)
        try:
            return await call.wait()
        finally:
            child.abandon(call)

    def statistics(self) -> EngineStatistics:
        """A snapshot, at once."""
        child, known, occupancy = self._child, self._known, self._occupancy()
        gauges = _NO_GAUGES if child is None or child.gauges is None else child.gauges
        ready = child is not None and child.ready is not None
        blocks = 0 if known is None else known.kv_blocks
        return EngineStatistics(
            ready=ready,
            running=occupancy.running,
            queued=occupancy.queued,
            capacity=occupancy.capacity,
            context_window=0 if known is None else known.context_window,
            tokens_per_second=self._gauge.speed_estimate(occupancy),
            ttft_estimate_ms=self._gauge.ttft_estimate_ms(occupancy),
            restarts=self._restarts,
            generated_tokens=self._gauge.generated_tokens,
            device="" if known is None else known.device,
            dtype="" if known is None else known.dtype,
            load_progress=1.0 if ready else 0.0 if child is None else child.loading.progress,
            kv_blocks=blocks,
            kv_blocks_free=blocks if gauges is _NO_GAUGES else gauges.kv_blocks_free,
            input_tokens=self._past.input_tokens + gauges.input_tokens,
            cached_tokens=self._past.cached_tokens + gauges.cached_tokens,
            prefix_horizon_s=0.0 if child is None else child.prefix_horizon_s(),
            preemptions=self._past.preemptions + gauges.preemptions,
        )

    def _admitted(self, request_id: str, *, places: int) -> Child:
        """The child, if it may be sent a request with so many answers."""
        child = self._child
        if child is None or child.ready is None:
            raise EngineDead(self._why_down())
        if request_id in child.calls:
            raise ValueError(f"request {request_id} is running already")
        limit = child.ready.capacity + self._config.max_queued
        if not 1 <= places <= limit:
            raise PromptRefused(f"This engine gives 1 to {limit} answers to a prompt.")
        if child.places + places > limit:
            now = self._occupancy()
            raise EngineBusy(
                f"{now.running} answers are being written and {now.queued} wait; "
                f"no more than {self._config.max_queued} may wait"
            )
        return child

    def _occupancy(self) -> Occupancy:
        child = self._child
        capacity = 1 if self._known is None else self._known.capacity
        places = 0 if child is None else child.places
        if child is None or child.gauges is None:
            queued = max(0, places - capacity)
            return Occupancy(running=places - queued, queued=queued, capacity=capacity)
        # The child knows who waits for memory although places are free, and we who came just now.
        gauges = child.gauges
        queued = max(places - capacity, min(gauges.queued, places))
        rate = gauges.prefill_tokens_per_second
        if places:
            # Prompts share the steps with those who stream, and get this much of each.
            rate *= 1 - 1 / self._config.stretch
        return Occupancy(
            running=places - queued,
            queued=queued,
            capacity=capacity,
            queued_prefill_tokens=child.queued_prefill_tokens if places else 0,
            prefill_tokens_per_second=rate,
        )

    def _why_down(self) -> str:
        if self._child is None:
            return self._down
        loading = self._child.loading
        return f"{self._down} ({loading.what}, {100 * loading.progress:.0f} %)"

    async def _supervise(self) -> None:
        """Keep a child alive until cancelled."""
        pause = self._config.restart_backoff_s
        while True:
            self._ready_at = math.inf
            self._child = Child(self._config, gauge=self._gauge, on_ready=self._on_ready)
            cause = await self._child.serve()
            if self._child.gauges is not None:
                self._past = _added(self._past, self._child.gauges)
            self._child = None
            self._down = f"the engine is being restarted: {cause}"
            attempt, self._attempt = self._attempt, _Attempt()
            if attempt.settled.is_set():
                if trio.current_time() - self._ready_at >= _STABLE_S:
                    pause = self._config.restart_backoff_s
            else:
                attempt.failure = cause
                attempt.settled.set()
            logger.error("engine %s: %s; restart in %.1f s", self._config.model.name, cause, pause)
            await trio.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_S)
            self._restarts += 1

    def _on_ready(self, ready: Ready) -> None:
        self._known = ready
        self._ready_at = trio.current_time()
        if self._gauge.generated_tokens == 0:
            self._gauge.preset(tokens_per_second=ready.tokens_per_second, ttft_ms=ready.ttft_ms)
        logger.info(
            "engine %s: ready on %s (%s), %.0f tokens/s",
            self._config.model.name,
            ready.device,
            ready.dtype,
            ready.tokens_per_second,
        )
        self._attempt.settled.set()


def _added(past: Gauges, last: Gauges) -> Gauges:
    """The counters of both; the rest is of no use any more."""
    return dataclasses.replace(
        _NO_GAUGES,
        input_tokens=past.input_tokens + last.input_tokens,
        cached_tokens=past.cached_tokens + last.cached_tokens,
        preemptions=past.preemptions + last.preemptions,
    )


@asynccontextmanager
async def open_engine(config: EngineConfig) -> AsyncIterator[ProcessEngine]:
    """An engine whose child is being started; `wait_ready` says when, or why not.

    Leaving the context ends the child and, with EngineDead, whatever still runs in it.
    """
    engine = ProcessEngine(config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._supervise)  # noqa: SLF001 - this function is the class's door
        yield engine
        nursery.cancel_scope.cancel()
