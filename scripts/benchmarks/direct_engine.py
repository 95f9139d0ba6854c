"""The engine without a network: the same process model, called where it stands."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from pinaivu_node.config import DATA_FOLDER
from pinaivu_node.engine.client import open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.types import ChatMessage, GenerationRequest, SamplingParams
from pinaivu_node.models.store import ModelStore


@asynccontextmanager
async def open_direct_engine(
    model: str, *, threads: int
) -> AsyncIterator[Callable[[str], Awaitable[float]]]:
    """A function from a prompt to the seconds until its first token."""
    folder = ModelStore(DATA_FOLDER / "models").resolve(model).folder
    numbers = iter(range(10**9))
    async with open_engine(EngineConfig(model=folder, threads=threads)) as engine:
        await engine.wait_ready()

        async def time_to_first_token(prompt: str) -> float:
            request = GenerationRequest(
                id=f"direct-{next(numbers)}",
                prompt=(ChatMessage(role="user", content=prompt),),
                sampling=SamplingParams(max_tokens=2, temperature=0.0),
            )
            started = time.perf_counter()
            first = 0.0
            async with engine.generate(request) as events:
                async for event in events:
                    if event.text and not first:
                        first = time.perf_counter() - started
            return first

        yield time_to_first_token
