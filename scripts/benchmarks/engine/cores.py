"""Which core does what, and how much of it somebody got."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.engine.contenders.turns import TICKS, cpu_seconds_of


@dataclass(frozen=True, slots=True)
class Cores:
    """The engine's, and the ones for everything beside it."""

    engine: tuple[int, ...]
    rest: tuple[int, ...]

    @property
    def threads(self) -> int:
        """Of the engine."""
        return len(self.engine)


def share_out(available: set[int], *, threads: int) -> Cores:
    """The last cores are the engine's: what the machine itself has to do is on the first."""
    ordered = sorted(available)
    if not 1 <= threads <= len(ordered):
        raise ValueError(f"there are {len(ordered)} cores, not {threads}")
    return Cores(tuple(ordered[-threads:]), tuple(ordered[:-threads]))


def pin(pid: int, cores: tuple[int, ...]) -> None:
    """Keep every thread that a process has now, and all that those will start, to these cores."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except ProcessLookupError:
            continue  # it ended


class CoreTime:
    """Seconds that a process had of its cores or could have had.

    What others took is left out: on a machine that does nothing else it is the time on the clock,
    and on a busy one it is what the clock would have said.  An engine that waits for its network
    leaves its core idle, and that counts.
    """

    def __init__(self, pid: int, cores: tuple[int, ...]) -> None:
        self._pid = pid
        self._cores = cores
        self._began = self._now()

    def seconds(self) -> float:
        """Since the beginning; exact to a few hundredths."""
        return self._now() - self._began

    def _now(self) -> float:
        idle = idle_seconds(Path("/proc/stat").read_text(), self._cores)
        return (idle + cpu_seconds_of(self._pid)) / len(self._cores)


def idle_seconds(statistics: str, cores: tuple[int, ...]) -> float:
    """How long these cores had nothing to do, or waited for a disk, as /proc/stat has it."""
    wanted = {f"cpu{core}" for core in cores}
    rows = (line.split() for line in statistics.splitlines())
    return sum(int(row[4]) + int(row[5]) for row in rows if row and row[0] in wanted) / TICKS
