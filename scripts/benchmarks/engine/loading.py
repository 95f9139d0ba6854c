"""How long a new process takes to have its model, and the daemon to have its engine."""

from __future__ import annotations

from typing import Any

import trio

from pinaivu_node.engine.config import EngineConfig
from scripts.benchmarks.engine.beside import pinned_engine
from scripts.benchmarks.engine.contender import OURS, contending
from scripts.benchmarks.engine.contenders.turns import cpu_seconds_of
from scripts.benchmarks.engine.environments import note
from scripts.benchmarks.engine.figures import Row, at_most, row
from scripts.benchmarks.engine.plan import Plan


def loading(plan: Plan) -> tuple[dict[str, Any], list[Row]]:
    """Each round starts two new processes; the files are in the machine's cache after the first."""
    figures: dict[str, list[float]] = {"load_cpu_s": [], "load_wall_s": []}
    figures |= {"ready_cpu_s": [], "ready_wall_s": []}
    config = EngineConfig(model=plan.model, device="cpu", threads=plan.cores.threads)
    for number in range(max(3, plan.rounds)):
        note(f"loading: round {number + 1}")
        with contending(OURS, cores=plan.cores, model=plan.model, dtype="float32") as engine:
            load = engine.order("loading")
        figures["load_cpu_s"].append(load["cpu_s"])
        figures["load_wall_s"].append(load["wall_s"])
        cpu, wall = trio.run(_until_ready, config, plan)
        figures["ready_cpu_s"].append(cpu)
        figures["ready_wall_s"].append(wall)
    return figures, [
        row(
            "converted model loaded, after imports", figures["load_cpu_s"], at_most(3), unit="CPU s"
        ),
        row("… on the clock", figures["load_wall_s"], unit="s"),
        row("engine process from start to ready", figures["ready_cpu_s"], unit="CPU s"),
        row("… on the clock", figures["ready_wall_s"], unit="s"),
    ]


async def _until_ready(config: EngineConfig, plan: Plan) -> tuple[float, float]:
    began = trio.current_time()
    async with pinned_engine(config, plan.cores) as engine:
        return cpu_seconds_of(engine.pid or 0), trio.current_time() - began
