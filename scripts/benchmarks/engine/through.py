"""Sixteen streams through a whole network of one provider, and the same from its engine alone.

Engine processes have one core; gateway, coordinator, provider and client share the other.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import httpx
import trio

from pinaivu_node.config import DATA_FOLDER
from pinaivu_node.devnet import DevnetPlan, open_devnet
from pinaivu_node.engine.client import ProcessEngine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.types import ChatMessage, GenerationRequest, SamplingParams
from scripts.benchmarks import http_streams
from scripts.benchmarks.engine.beside import pinned_engine
from scripts.benchmarks.engine.contenders.turns import descendants
from scripts.benchmarks.engine.cores import Cores, CoreTime, pin
from scripts.benchmarks.engine.environments import note
from scripts.benchmarks.engine.figures import Row, at_least, missing, ratios, row
from scripts.benchmarks.engine.plan import Plan

STREAMS: Final = 16
_SHARE: Final = at_least(0.9)
_ENGINE: Final = b"pinaivu_node.engine.child"


def network(plan: Plan) -> tuple[dict[str, Any], list[Row]]:
    """Tokens per second of both, by turns."""
    if not plan.cores.rest:
        reason = "gateway and coordinator need a core beside the engine's"
        return {}, [missing("16 streams through the network ÷ engine", reason, _SHARE)]
    before = os.sched_getaffinity(0)
    try:
        figures = trio.run(_measure, plan)
    finally:
        pin(os.getpid(), tuple(before))
    through, alone = figures["through_tokens_per_core_s"], figures["alone_tokens_per_core_s"]
    on_the_clock = ratios(figures["through_tokens_per_s"], figures["alone_tokens_per_s"])
    return figures, [
        row("16 streams from the engine", alone, unit="tokens/core s"),
        row("16 streams through the network", through, unit="tokens/core s"),
        row("through the network ÷ engine", ratios(through, alone), _SHARE, unit="×"),
        row("… on the clock, others' work included", on_the_clock, unit="×"),
    ]


async def _measure(plan: Plan) -> dict[str, list[float]]:
    tokens = 48 if plan.quick else 192
    figures: dict[str, list[float]] = {
        "alone_tokens_per_s": [],
        "alone_tokens_per_core_s": [],
        "through_tokens_per_s": [],
        "through_tokens_per_core_s": [],
    }
    config = EngineConfig(model=plan.model, device="cpu", threads=plan.cores.threads)
    with tempfile.TemporaryDirectory(prefix="pnv-") as home:
        async with pinned_engine(config, plan.cores) as engine:
            # From here on this process is beside the engine's core, and so is all that it starts.
            devnet = DevnetPlan(
                home=Path(home),
                models_folder=DATA_FOLDER / "models",
                models=(plan.name,),
                providers=1,
                port=0,
                threads=plan.cores.threads,
            )
            async with open_devnet(devnet) as net:
                child = _engine_of(net.processes["providers"][0])
                pin(child, plan.cores.engine)
                port, key = httpx.URL(net.base_url).port or 80, net.api_key
                for number in range(plan.rounds + 1):
                    note(f"network: round {number} of {plan.rounds}")
                    alone = _Clocks(engine.pid or 0, plan.cores)
                    alone.stop(await _alone(engine, number, tokens))
                    through = _Clocks(child, plan.cores)
                    through.stop(await _through(port, key, plan.name, number=number, tokens=tokens))
                    if number:  # the first warms both
                        figures["alone_tokens_per_s"].append(alone.per_second)
                        figures["through_tokens_per_s"].append(through.per_second)
                        figures["alone_tokens_per_core_s"].append(alone.per_core_second)
                        figures["through_tokens_per_core_s"].append(through.per_core_second)
    return figures


class _Clocks:
    """From the first request to the last token."""

    def __init__(self, engine: int, cores: Cores) -> None:
        self._core_time = CoreTime(engine, cores.engine)
        self._began = time.perf_counter()

    def stop(self, tokens: int) -> None:
        """So many tokens are there."""
        self.per_second = tokens / (time.perf_counter() - self._began)
        self.per_core_second = tokens / self._core_time.seconds()


def _engine_of(provider: int) -> int:
    for pid in descendants(provider):
        if _ENGINE in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise RuntimeError("the provider has no engine process")


def _prompt(number: int, stream: int) -> str:
    return f"Write a long text about the number {1000 * number + stream}."


async def _alone(engine: ProcessEngine, number: int, tokens: int) -> int:
    """Ask the engine for 16 answers; how many tokens came."""
    made = 0

    async def stream(place: int) -> None:
        nonlocal made
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        prompt = (ChatMessage(role="user", content=_prompt(number, place)),)
        request = GenerationRequest(f"n{place}", prompt, sampling)
        async with engine.generate(request) as events:
            async for event in events:
                made += len(event.token_ids)

    async with trio.open_nursery() as nursery:
        for place in range(STREAMS):
            nursery.start_soon(stream, place)
    return made


async def _through(port: int, key: str, model: str, *, number: int, tokens: int) -> int:
    """As `_alone`, from the gateway."""
    made = 0

    async def stream(place: int) -> None:
        nonlocal made
        body = {
            "model": model,
            "messages": [{"role": "user", "content": _prompt(number, place)}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with http_streams.connect(port, api_key=key) as connection:
            _, received = await connection.ask(body)
        counts = re.findall(rb'"completion_tokens":\s*(\d+)', received)
        if not counts:
            raise RuntimeError(f"no usage in {received[-300:]!r}")
        made += int(counts[-1])

    async with trio.open_nursery() as nursery:
        for place in range(STREAMS):
            nursery.start_soon(stream, place)
    return made
