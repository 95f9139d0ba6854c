"""An engine without a model, to measure everything around an engine.  Its name where it is chosen
is `bench`: nothing that it says is an answer.

It emits words at an even pace, the tokens of all running requests at the same instants, as an
engine that batches does.  It waits by the event loop's clock alone, so that a simulated network
under a virtual clock runs as fast as the machine allows, and repeats itself exactly.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from pinaivu_node.engine.gauge import Occupancy, SpeedGauge, Timing
from pinaivu_node.engine.prompt_size import count_tokens
from pinaivu_node.engine.sampling import noise
from pinaivu_node.engine.types import (
    EmbeddingRequest,
    Embeddings,
    EngineBusy,
    EngineStatistics,
    FinishReason,
    GenerationRequest,
    PromptRefused,
    TokenEvent,
)

_VOCABULARY: Final = (
    *("the ", "a ", "of ", "and ", "market ", "token ", "peer ", "bid "),
    *("price ", "proof ", "light ", "river ", "stone ", "winter ", "ünï ", "\n"),
)

_MAX_ANSWERS: Final = 128
"""As OpenAI's own bound on `n`."""


class _Answer:
    """One generation: an async iterator of its events, those of all its answers in turn."""

    def __init__(self, engine: SyntheticEngine, request: GenerationRequest, *, waits: bool) -> None:
        self._engine = engine
        self._request = request
        self._input_tokens = count_tokens(request.prompt)
        self._produced = len(request.resume_token_ids)
        room = engine.context_window - self._input_tokens
        self._limit = max(1, min(request.sampling.max_tokens, room))
        self._index = 0
        self._next_at: float | None = None
        self.has_place = False
        self.timing = Timing(asked=trio.current_time(), waited=waits, answers=request.sampling.n)

    def __aiter__(self) -> _Answer:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._produced >= self._limit:
            raise StopAsyncIteration
        if self._index == 0:
            await self._wait_for_the_step()
        self._engine.gauge.tokens(self.timing, 1, now=trio.current_time())
        return self._event()

    async def _wait_for_the_step(self) -> None:
        if self._next_at is None:
            await self._engine.places.acquire_on_behalf_of(self)
            self.has_place = True
            self._next_at = self._engine.tick_after(trio.current_time() + self._engine.ttft_s)
        await trio.sleep_until(self._next_at)
        self._next_at += self._engine.step_s

    def _event(self) -> TokenEvent:
        sampling, index = self._request.sampling, self._index
        seed = noise.answer_seed(sampling.seed, index)
        token_id = noise.stream(seed, self._input_tokens + self._produced) % len(_VOCABULARY)
        is_last = self._produced + 1 >= self._limit
        self._index = (index + 1) % sampling.n
        self._produced += self._index == 0
        return TokenEvent(
            request_id=self._request.id,
            token_ids=(token_id,),
            text=_VOCABULARY[token_id],
            input_tokens=self._input_tokens,
            finish_reason=FinishReason.LENGTH if is_last else None,
            index=index,
        )


class SyntheticEngine:
    """An `Engine` that speaks nonsense at a known speed.  Ready at once; owns nothing."""

    def __init__(
        self,
        *,
        tokens_per_second: float = 100.0,
        ttft_ms: float = 50.0,
        capacity: int = 16,
        context_window: int = 8192,
        max_queued: int = 8,
    ) -> None:
        """`tokens_per_second` is per answer; a request waits while `capacity` others run.

        A request has one place, however many answers it wants.
        """
        self.context_window = context_window
        self.step_s = 1.0 / tokens_per_second
        self.ttft_s = ttft_ms / 1000
        self.places = trio.CapacityLimiter(capacity)
        self.gauge = SpeedGauge()
        self.gauge.preset(tokens_per_second=tokens_per_second, ttft_ms=ttft_ms)
        self._capacity = capacity
        self._max_queued = max_queued
        self._requests = 0

    async def wait_ready(self) -> None:
        """Return at once: there is nothing to load."""
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[TokenEvent]]:
        """See `Engine.generate`."""
        _check(request)
        input_tokens = count_tokens(request.prompt)
        if input_tokens + len(request.resume_token_ids) >= self.context_window:
            raise PromptRefused(
                f"This model's maximum context length is {self.context_window} tokens. "
                f"However, your messages resulted in {input_tokens} tokens."
            )
        if self._requests >= self._capacity + self._max_queued:
            raise EngineBusy(f"{self._requests} requests are running or waiting")
        answer = _Answer(self, request, waits=self._requests >= self._capacity)
        self._requests += 1
        try:
            yield answer
        finally:
            self.gauge.finished(answer.timing, running=self._occupancy().running)
            self._requests -= 1
            if answer.has_place:
                self.places.release_on_behalf_of(answer)

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Refuse: there is nothing whose meaning could be a vector."""
        await trio.lowlevel.checkpoint()
        raise PromptRefused(f"This engine makes no embeddings ({len(request.inputs)} were wanted).")

    def statistics(self) -> EngineStatistics:
        """A snapshot, at once."""
        occupancy = self._occupancy()
        return EngineStatistics(
            ready=True,
            running=occupancy.running,
            queued=occupancy.queued,
            capacity=self._capacity,
            context_window=self.context_window,
            tokens_per_second=self.gauge.speed_estimate(occupancy),
            ttft_estimate_ms=self.gauge.ttft_estimate_ms(occupancy),
            restarts=0,
            generated_tokens=self.gauge.generated_tokens,
            device="none",
            dtype="none",
        )

    def _occupancy(self) -> Occupancy:
        running = min(self._requests, self._capacity)
        return Occupancy(running=running, queued=self._requests - running, capacity=self._capacity)

    def tick_after(self, moment: float) -> float:
        """The engine's next step at or after this moment."""
        return math.ceil(moment / self.step_s) * self.step_s


def _check(request: GenerationRequest) -> None:
    """PromptRefused for what nonsense cannot have."""
    if request.constraint is not None or request.tools is not None:
        raise PromptRefused("This engine knows no constraints and no tools.")
    if request.sampling.logprobs is not None:
        raise PromptRefused("This engine does not report logprobs.")
    if not 1 <= request.sampling.n <= _MAX_ANSWERS:
        raise PromptRefused(f"This engine gives 1 to {_MAX_ANSWERS} answers to a prompt.")
    if request.resume_token_ids and request.sampling.n > 1:
        raise PromptRefused("Several answers cannot be continued.")
