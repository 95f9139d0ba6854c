"""A contender without a model, run as a process by the tests beside it."""

from __future__ import annotations

import os
import sys
from typing import Any

from scripts.benchmarks.engine.contenders.turns import take_turns


def load(settings: dict[str, Any]) -> dict[str, Any]:
    if settings["dtype"] == "unknown":
        raise ValueError("no such dtype")
    sys.stdout.write("a library that prints where it should not\n")

    def repeat(**what: Any) -> dict[str, Any]:
        sys.stdout.write("and once more\n")
        return what | {"on": sorted(os.sched_getaffinity(0)), "set": settings["more"]}

    def die() -> None:
        sys.stderr.write("out of luck\n")
        os._exit(3)

    return {"repeat": repeat, "die": die}


if __name__ == "__main__":
    take_turns(load)
