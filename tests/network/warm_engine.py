"""An engine without a model that keeps prompts, as a real one does: by blocks and by tenant."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import trio

from pinaivu_node.engine.synthetic import SyntheticEngine
from pinaivu_node.engine.types import (
    Alternative,
    ChatMessage,
    EmbeddingRequest,
    Embeddings,
    EngineStatistics,
    FinishReason,
    GenerationRequest,
    TokenEvent,
    TokenLogprob,
    ToolCallDelta,
)

BLOCK = 64
OPENING = 4
"""Tokens that open the answer, which the next turn's prompt has as well."""


class WarmEngine:
    """A token per letter of a chat; a prompt is read at a steady pace, as far as it is cold."""

    def __init__(self, *, prefill_per_second: float = 2000.0, remembers: bool = True) -> None:
        self.asked: list[GenerationRequest] = []
        self.remembers = remembers
        """Whether it does keep what its statistics say it keeps."""
        self.restarts = 0
        self.horizon = math.inf
        self.calls: tuple[ToolCallDelta, ...] = ()
        """What it says with its last token, beside the text."""
        self._pace = prefill_per_second
        self._voice = SyntheticEngine(tokens_per_second=50, ttft_ms=20, capacity=8)
        self._blocks: set[tuple[bytes, str]] = set()
        self._input = 0
        self._cached = 0

    def forget(self) -> None:
        self._blocks.clear()

    def restart(self) -> None:
        self.forget()
        self.restarts += 1

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[TokenEvent]]:
        self.asked.append(request)
        text = _rendered(request)
        blocks = [(request.tenant, text[:end]) for end in range(BLOCK, len(text), BLOCK)]
        warm = 0
        while warm < len(blocks) and blocks[warm] in self._blocks:
            warm += 1
        plain = replace(request.sampling, logprobs=None, stop_token_ids=())
        asked = replace(request, sampling=plain, constraint=None, tools=None)
        async with (
            self._voice.generate(asked) as events,
            aclosing(
                self._spoken(request, events, blocks, cached=BLOCK * warm, size=len(text))
            ) as spoken,
        ):
            yield spoken

    async def _spoken(
        self,
        request: GenerationRequest,
        events: AsyncIterator[TokenEvent],
        blocks: list[tuple[bytes, str]],
        *,
        cached: int,
        size: int,
    ) -> AsyncGenerator[TokenEvent, None]:
        await trio.sleep((size - cached) / self._pace)
        if self.remembers:
            self._blocks.update(blocks)
        self._input += size
        self._cached += cached
        async for event in events:
            ended = event.finish_reason is not None
            yield replace(
                event,
                input_tokens=size,
                cached_tokens=cached,
                logprobs=_logprobs(request, event),
                tool_calls=self.calls if ended else (),
                finish_reason=FinishReason.TOOL_CALLS
                if ended and self.calls
                else event.finish_reason,
            )

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        return await self._voice.embed(request)

    async def wait_ready(self) -> None:
        await self._voice.wait_ready()

    def statistics(self) -> EngineStatistics:
        return replace(
            self._voice.statistics(),
            restarts=self.restarts,
            prefix_horizon_s=self.horizon,
            input_tokens=self._input,
            cached_tokens=self._cached,
            kv_blocks=100,
            kv_blocks_free=max(0, 100 - len(self._blocks)),
        )


def _rendered(request: GenerationRequest) -> str:
    if isinstance(request.prompt, str):
        return request.prompt
    turns = [each for each in request.prompt if isinstance(each, ChatMessage)]
    return "".join(f"<{turn.role}>{turn.content}</>" for turn in turns) + "<" * OPENING


def _logprobs(request: GenerationRequest, event: TokenEvent) -> tuple[TokenLogprob, ...]:
    count = request.sampling.logprobs
    if count is None:
        return ()
    top = tuple(Alternative(number, b"x", -1.0 - number) for number in range(count))
    return tuple(
        TokenLogprob(Alternative(token_id, b"x", -0.5), top) for token_id in event.token_ids
    )
