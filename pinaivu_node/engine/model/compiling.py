"""Tells of kernels that are compiled: once on a machine, and longer than the rest of a start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event


class _Ear(event.Listener):  # type: ignore[misc]  # numba has no types
    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def on_start(self, _event: Any) -> None:
        self._tell()

    def on_end(self, _event: Any) -> None:
        pass


@contextmanager
def telling_of_compiling(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` before each kernel that was not on the disk is compiled, on the thread that does.

    The event is numba's own, and is there only where its cache did not have the kernel.
    """
    with event.install_listener("numba:compile", _Ear(tell)):
        yield
