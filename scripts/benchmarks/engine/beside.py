"""The daemon's event loop beside a saturated engine, and how long a token takes to it.

The engine's process is the real one, started and read by `open_engine`; it has its core, the loop
has another.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import trio

from pinaivu_node.engine import process
from pinaivu_node.engine.client import ProcessEngine, open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.types import GenerationRequest, SamplingParams
from scripts.benchmarks.engine.contenders.turns import prompts
from scripts.benchmarks.engine.cores import Cores, pin
from scripts.benchmarks.engine.environments import note
from scripts.benchmarks.engine.figures import Row, at_most, missing, quantile, row
from scripts.benchmarks.engine.plan import Plan
from scripts.benchmarks.engine.stamped_child import STAMPS

STREAMS: Final = 16
TICK_S: Final = 0.002
Measured = tuple[dict[str, Any], list[Row]]
_DELAY: Final = at_most(4)
_PASSAGE: Final = at_most(1)


def beside(plan: Plan) -> Measured:
    """How late timers fire while 16 streams run, and how old a token is when a task has it."""
    if not plan.cores.rest:
        reason = "the event loop needs a core beside the engine's"
        return {}, [missing("event loop beside a saturated engine", reason, _DELAY)]
    figures: dict[str, list[float]] = {
        "idle_delay_p99_ms": [],
        "delay_p50_ms": [],
        "delay_p99_ms": [],
        "passage_p50_ms": [],
        "passage_p99_ms": [],
    }
    for number in range(plan.rounds):
        note(f"beside: round {number + 1} of {plan.rounds}")
        for name, value in trio.run(_round, plan).items():
            figures[name].append(value)
    return figures, [
        row("timer late, idle engine, p99", figures["idle_delay_p99_ms"], unit="ms"),
        row("timer late, saturated engine, p99", figures["delay_p99_ms"], _DELAY, unit="ms"),
        row("engine process → trio task, p50", figures["passage_p50_ms"], _PASSAGE, unit="ms"),
        row("engine process → trio task, p99", figures["passage_p99_ms"], unit="ms"),
    ]


async def _round(plan: Plan) -> dict[str, float]:
    tokens = 60 if plan.quick else 240
    config = EngineConfig(model=plan.model, device="cpu", threads=plan.cores.threads)
    with tempfile.TemporaryDirectory(prefix="pnv-") as folder, _stamping(folder) as stamps:
        async with pinned_engine(config, plan.cores) as engine:
            idle = await _ticks_while(trio.sleep, 1.0 if plan.quick else 3.0)
            arrivals: dict[tuple[str, int], int] = {}
            busy = await _ticks_while(_saturate, engine, tokens, arrivals)
        ages = [
            arrivals[key] - left for key, left in read_stamps(stamps).items() if key in arrivals
        ]
    return {
        "idle_delay_p99_ms": 1000 * quantile(idle, 0.99),
        "delay_p50_ms": 1000 * quantile(busy, 0.5),
        "delay_p99_ms": 1000 * quantile(busy, 0.99),
        "passage_p50_ms": quantile(ages, 0.5) / 1e6,
        "passage_p99_ms": quantile(ages, 0.99) / 1e6,
    }


@asynccontextmanager
async def pinned_engine(config: EngineConfig, cores: Cores) -> AsyncIterator[ProcessEngine]:
    """An engine that is ready, on its cores; this process is on the rest from then on."""
    before = os.sched_getaffinity(0)
    pin(os.getpid(), cores.engine)  # its process inherits them
    try:
        async with open_engine(config) as engine:
            await engine.wait_ready()
            pin(os.getpid(), cores.rest)
            yield engine
    finally:
        pin(os.getpid(), tuple(before))


async def _ticks_while(work: Callable[..., Awaitable[None]], *arguments: Any) -> list[float]:
    """Seconds by which a timer that is due every two milliseconds is late, until the work ends."""
    late: list[float] = []

    async def tick() -> None:
        due = trio.current_time()
        while True:
            due = max(due + TICK_S, trio.current_time())
            await trio.sleep_until(due)
            late.append(trio.current_time() - due)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        await work(*arguments)
        nursery.cancel_scope.cancel()
    return late


async def _saturate(
    engine: ProcessEngine, tokens: int, arrivals: dict[tuple[str, int], int]
) -> None:
    async def stream(name: str, prompt: list[int]) -> None:
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(name, tuple(prompt), sampling)
        total = 0
        async with engine.generate(request) as events:
            async for event in events:
                total += len(event.token_ids)
                arrivals[name, total] = time.monotonic_ns()

    async with trio.open_nursery() as nursery:
        for number, prompt in enumerate(prompts(STREAMS, length=64, seed=1)):
            nursery.start_soon(stream, f"s{number}", prompt)


@contextmanager
def _stamping(folder: str) -> Iterator[Path]:
    """Engine processes started here note when they let go of frames."""
    stamps = Path(folder) / "stamps"
    command = process._COMMAND  # noqa: SLF001 - there is no other way to start another program
    os.environ[STAMPS] = str(stamps)
    program = str(Path(__file__).with_name("stamped_child.py"))
    process._COMMAND = (sys.executable, "-P", "-B", program)  # type: ignore[misc]  # noqa: SLF001
    try:
        yield stamps
    finally:
        process._COMMAND = command  # type: ignore[misc]  # noqa: SLF001
        del os.environ[STAMPS]


def read_stamps(path: Path) -> dict[tuple[str, int], int]:
    """When each request's so many-th token was let go of."""
    stamps: dict[tuple[str, int], int] = {}
    for line in path.read_text().splitlines():
        left, name, total = line.split()
        stamps.setdefault((name, int(total)), int(left))
    return stamps
