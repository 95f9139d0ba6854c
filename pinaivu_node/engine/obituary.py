"""Why an engine process is gone that did not say so itself."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

_HEADER: Final = "Traceback (most recent call last):"
_FATAL: Final = re.compile(
    r"Fatal Python error|terminate called|what\(\):|CUDA error|out of memory"
    r"|rank \d+ of the engine was ended"
)
"""What the interpreter, the C++ runtime, CUDA and `tensor_parallel` say last, outside any
traceback."""
_MAX_CHARACTERS: Final = 500


class LastWords:
    """What was last worth remembering of a process's log: how a traceback ended, if one did."""

    def __init__(self) -> None:
        self._last = ""
        self._error = ""
        self._in_traceback = False

    def heard(self, line: str) -> None:
        """A line of the log, its indentation kept."""
        if not line.strip():
            return
        self._last = line
        if line.startswith(_HEADER):
            self._in_traceback = True
        elif self._in_traceback and not line.startswith(" "):
            self._in_traceback = False
            self._error = line
        elif _FATAL.search(line):
            self._error = line

    def __str__(self) -> str:
        return (self._error or self._last).strip()[:_MAX_CHARACTERS]


def obituary(returncode: int | None, last_words: str, *, memory_ran_out: bool | None) -> str:
    """The cause in words; `memory_ran_out` is None where the system does not tell."""
    last = f": {last_words}" if last_words else ""
    if returncode is None or returncode >= 0:
        return f"the engine process exited with status {returncode}{last}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:  # a real-time signal has no name of its own
        name = f"signal {-returncode}"
    if -returncode != signal.SIGKILL:
        return f"the engine process was ended by {name}{last}"
    if memory_ran_out is None:
        return f"the engine process was ended by {name} (the system does so when memory runs out)"
    if memory_ran_out:
        return f"memory ran out: the system ended the engine process by {name}"
    return f"the engine process was ended by {name}"


class MemoryWatch:
    """Whether the system killed anything for want of memory since this was made."""

    def __init__(self, count: Callable[[], int | None]) -> None:
        self._count = count
        self._before = count()

    def ran_out(self) -> bool | None:
        """None if the system does not count."""
        now = self._count()
        return None if now is None or self._before is None else now > self._before


def oom_kills() -> int | None:
    """Processes that were killed for want of memory, as our control group or the kernel counts.

    Small files of the kernel's own making: reading them waits for no disk.
    """
    for path in (_memory_events(), Path("/proc/vmstat")):
        try:
            for line in path.read_text().splitlines():
                name, _, number = line.partition(" ")
                if name == "oom_kill":
                    return int(number)
        except (OSError, ValueError):
            continue
    return None


def _memory_events() -> Path:
    """Where cgroup v2 counts for us and our children."""
    try:
        own = Path("/proc/self/cgroup").read_text()
    except OSError:
        own = ""
    group = own.partition("0::")[2].partition("\n")[0].lstrip("/")
    return Path("/sys/fs/cgroup") / group / "memory.events"
