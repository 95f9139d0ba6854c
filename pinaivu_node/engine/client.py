"""The engine as the daemon holds it: a model in a child process that is watched and restarted.

The model's crashes, its memory and its grip on the interpreter lock stay in the child.  The child
holds the queue of requests; this end counts them and refuses beyond the bound.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.frames import Ready
from pinaivu_node.engine.gauge import SpeedGauge
from pinaivu_node.engine.process import Child
from pinaivu_node.engine.types import (
    EngineBusy,
    EngineDead,
    EngineStatistics,
    GenerationRequest,
    TokenEvent,
)

logger = logging.getLogger(__name__)

_MAX_PAUSE_S: Final = 30.0
_STABLE_S: Final = 60.0
"""A child that was ready for so long was well; the pause after its death is the short one again."""


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
        self._down = "the model is still loading"

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
        child = self._child
        if child is None or child.ready is None:
            raise EngineDead(self._down)
        if request.id in child.calls:
            raise ValueError(f"request {request.id} is running already")
        ready = child.ready
        running = len(child.calls)
        if running >= ready.capacity + self._config.max_queued:
            raise EngineBusy(f"{running} requests are running or waiting")
        call = child.submit(request, window=ready.context_window, waits=running >= ready.capacity)
        try:
            await call.wait_accepted()
            yield call
        finally:
            child.abandon(call)

    def statistics(self) -> EngineStatistics:
        """A snapshot, at once."""
        known = self._known
        capacity = 1 if known is None else known.capacity
        calls = 0 if self._child is None else len(self._child.calls)
        return EngineStatistics(
            ready=self._child is not None and self._child.ready is not None,
            running=min(calls, capacity),
            queued=max(0, calls - capacity),
            capacity=capacity,
            context_window=0 if known is None else known.context_window,
            tokens_per_second=self._gauge.tokens_per_second,
            ttft_estimate_ms=self._gauge.ttft_estimate_ms(
                ahead=max(0, calls - capacity + 1), capacity=capacity
            ),
            restarts=self._restarts,
            generated_tokens=self._gauge.generated_tokens,
            device="" if known is None else known.device,
            dtype="" if known is None else known.dtype,
        )

    async def _supervise(self) -> None:
        """Keep a child alive until cancelled."""
        pause = self._config.restart_backoff_s
        while True:
            began = trio.current_time()
            self._child = Child(self._config, gauge=self._gauge, on_ready=self._on_ready)
            cause = await self._child.serve()
            self._child = None
            self._down = f"the engine is being restarted: {cause}"
            attempt, self._attempt = self._attempt, _Attempt()
            if attempt.settled.is_set():
                if trio.current_time() - began >= _STABLE_S:
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
