"""How fast the engine is: by itself, beside other engines on the same core, and in the network.

Examples:
  scripts/bench engine                              everything, in about twenty-five minutes
  scripts/bench engine --quick                      a first impression, in three
  scripts/bench engine --only decode --against 'vLLM eager' --rounds 5
  scripts/bench engine --only prefix joining --json
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from scripts.benchmarks.engine import beside, company, decode, loading, through
from scripts.benchmarks.engine.cores import share_out
from scripts.benchmarks.engine.environments import note
from scripts.benchmarks.engine.figures import Row
from scripts.benchmarks.engine.plan import Plan

MODEL: Final = "smollm2:135m"
_MEASURES: Final[dict[str, Callable[[Plan], tuple[dict[str, Any], list[Row]]]]] = {
    "decode": decode.measure,
    "prefix": company.prefix,
    "joining": company.joining,
    "constraint": company.constraint,
    "speculation": company.speculation,
    "beside": beside.beside,
    "loading": loading.loading,
    "network": through.network,
}
PARTS: Final = tuple(_MEASURES)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be chosen, besides what every subject offers."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("--only", nargs="+", choices=PARTS, help="measure these parts")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, batches, opponents")
    parser.add_argument("--rounds", type=int, help="of each measurement; default 3, quick 2")
    parser.add_argument(
        "--against",
        nargs="*",
        choices=decode.OPPONENTS,
        metavar="ENGINE",
        help=f"who decodes by turns with ours: {', '.join(decode.OPPONENTS)}; default all, "
        f"with --quick {', '.join(decode.QUICK_OPPONENTS)}",
    )
    parser.add_argument("--threads", type=int, default=1, help="cores of each engine; default 1")
    parser.add_argument("--model", default=MODEL, help=f"default {MODEL}")


def measure(
    *,
    only: Sequence[str] | None = None,
    quick: bool = False,
    rounds: int | None = None,
    against: Sequence[str] | None = None,
    threads: int = 1,
    model: str = MODEL,
) -> dict[str, Any]:
    """Every figure of one run, with its target."""
    default = decode.QUICK_OPPONENTS if quick else decode.OPPONENTS
    plan = Plan(
        model=_folder(model),
        name=model,
        cores=share_out(os.sched_getaffinity(0), threads=threads),
        rounds=rounds or (2 if quick else 3),
        batches=(1, 16) if quick else (1, 8, 16, 32),
        tokens=17 if quick else 33,
        opponents=tuple(default if against is None else against),
        quick=quick,
    )
    figures: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {_processor()}",
        "python": platform.python_version(),
        "model": model,
        "engine_cores": plan.cores.engine,
        "rounds": plan.rounds,
        "targets": [],
    }
    for part in PARTS:
        if only is None or part in only:
            note(f"measuring {part} …")
            figures[part], rows = _MEASURES[part](plan)
            figures["targets"] += rows
    return figures


def _folder(model: str) -> Path:
    from rich.console import Console

    from pinaivu_node.config import DATA_FOLDER
    from pinaivu_node.models.pull import pull_missing
    from pinaivu_node.models.store import ModelStore

    models = DATA_FOLDER / "models"
    pull_missing(models, [model], console=Console(stderr=True))
    return ModelStore(models).resolve(model).folder


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"
