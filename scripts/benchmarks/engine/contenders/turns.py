"""What every contender does: hear an order, carry it out, say what it took.

Orders and answers are lines of JSON on the pipes that were stdin and stdout at the start; whatever
a library prints goes to stderr.  Nothing here imports anything but the standard library: contenders
run in environments of their own.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TextIO

TICKS: Final = os.sysconf("SC_CLK_TCK")
Handler = Callable[..., dict[str, Any]]


def prompts(batch: int, *, length: int, seed: int) -> list[list[int]]:
    """Token ids without sense, the same for every contender; no two prompts begin alike."""
    dice = random.Random(seed)  # noqa: S311 - not for secrets
    return [dice.choices(range(1000, 40000), k=length) for _ in range(batch)]


class Stamps:
    """How much CPU time had passed, and how many tokens there were, after each step."""

    def __init__(self) -> None:
        self._stamps: list[tuple[float, float, int]] = []
        self._tokens = 0
        self._by_children = _by_children()

    def stamp(self, tokens: int) -> None:
        """A step is over that brought so many tokens."""
        self._tokens += tokens
        self._stamps.append((time.process_time(), time.perf_counter(), self._tokens))

    def since(self, first: int = 0) -> dict[str, Any]:
        """What was made after step `first`, and in how much time."""
        cpu, wall, tokens = self._stamps[first]
        last_cpu, last_wall, last_tokens = self._stamps[-1]
        # Looking for children takes long, so it is not done at each step.
        by_children = _by_children() - self._by_children
        return {
            "tokens": last_tokens - tokens,
            "cpu_s": last_cpu - cpu + by_children,
            "wall_s": last_wall - wall,
        }


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and its children that live."""
    return time.process_time() + _by_children()


def _by_children() -> float:
    return sum(cpu_seconds_of(child) for child in descendants(os.getpid()))


def descendants(pid: int) -> list[int]:
    """Every process that descends from this one and lives."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue  # the thread ended
        for child in map(int, children):
            found += [child, *descendants(child)]
    return found


def cpu_seconds_of(pid: int) -> float:
    """Of another process, in ticks of 10 ms; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def take_turns(load: Callable[[dict[str, Any]], dict[str, Handler]]) -> None:
    """Load by the settings in argv, then carry out orders until there are no more."""
    settings = json.loads(sys.argv[1])
    os.sched_setaffinity(0, settings["cores"])
    answers = _own_stdout()
    try:
        handlers = load(settings)
    except Exception as exc:
        _say(answers, {"failed": f"{type(exc).__name__}: {exc}"[:300]})
        raise
    _say(answers, {"ready": sorted(handlers)})
    for line in sys.stdin:
        order = json.loads(line)
        _say(answers, handlers[order.pop("do")](**order))
    # Some engines wait at their end for threads that wait for them.
    os._exit(0)


def _own_stdout() -> TextIO:
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return kept


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
