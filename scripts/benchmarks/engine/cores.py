"""Which core does what, and how much of it somebody got."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


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
