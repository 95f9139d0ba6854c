"""Sending once per turn of the event loop what all tasks wrote in it.

When every task that could run has run, and trio is about to wait, whatever they wrote leaves: one
Noise message and one system call for a whole turn, and no task to be woken for it.  A write in an
otherwise idle process leaves in the same microseconds as if it had been sent at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

logger = logging.getLogger(__name__)

_flusher: trio.lowlevel.RunVar[Flusher] = trio.lowlevel.RunVar("flusher")


class Flusher(trio.abc.Instrument):
    """Calls back, once, whoever asked for it since the last turn."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []
        self._token = trio.lowlevel.current_trio_token()

    @classmethod
    def of_this_run(cls) -> Flusher:
        """The one of this event loop, put to work when first asked for."""
        try:
            return _flusher.get()
        except LookupError:
            flusher = cls()
            _flusher.set(flusher)
            trio.lowlevel.add_instrument(flusher)
            return flusher

    def add(self, flush: Callable[[], None]) -> None:
        """Call this at the end of the turn.  It must not raise."""
        self._waiting.append(flush)

    def later(self, action: Callable[[], None]) -> None:
        """Call this as soon as possible, in a turn of its own.

        At the end of a turn it is too late to wake a task: trio has made up its mind how long it
        will wait.
        """
        self._token.run_sync_soon(action)

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        """All tasks have had their turn."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for flush in waiting:
                try:
                    flush()
                except Exception:  # trio would send us home, and every connection with us
                    logger.exception("a connection could not be flushed")
