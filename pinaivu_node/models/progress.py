"""How a long piece of work tells a person how far it is."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich import progress as bars
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Progress(Protocol):
    """What work reports to; every method returns at once."""

    def step(self, what: str, *, total: int | None = None) -> None:
        """A new step begins; `total` in bytes if its length is known."""

    def advance(self, done: int, *, total: int | None = None) -> None:
        """So many bytes of this step are done, counted from its start."""

    def note(self, text: str) -> None:
        """Something to read that stays on the screen."""


class SilentProgress:
    """For work that nobody watches."""

    def step(self, what: str, *, total: int | None = None) -> None:
        """Nothing."""

    def advance(self, done: int, *, total: int | None = None) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class ConsoleProgress:
    """Bars on a terminal; plain lines, one per step, anywhere else.  Use it as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = bars.Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_step()
        self._bars.stop()

    def step(self, what: str, *, total: int | None = None) -> None:
        """See `Progress.step`."""
        self._end_step()
        if not self._console.is_terminal:
            self._console.print(what, markup=False, soft_wrap=True)
        self._task = self._bars.add_task(what, total=total)

    def advance(self, done: int, *, total: int | None = None) -> None:
        """See `Progress.advance`."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _end_step(self) -> None:
        if self._task is None:
            return
        task = self._bars.tasks[-1]
        if task.total is None:
            self._bars.update(self._task, total=max(1, int(task.completed)))
        self._bars.update(self._task, completed=self._bars.tasks[-1].total)
        self._bars.stop_task(self._task)
        self._task = None
