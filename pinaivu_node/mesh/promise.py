"""A result that one task makes and others wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import trio

from pinaivu_node.mesh.mesh import MeshError

T = TypeVar("T")


class Promise(Generic[T]):
    """Fulfilled or failed once.  `abandon` is given a value that came when nobody waited."""

    def __init__(self, *, abandon: Callable[[T], None] | None = None) -> None:
        self._abandon = abandon
        self._done = trio.Event()
        self._waiting = 0
        self._values: list[T] = []
        self._error: MeshError | None = None

    def fulfil(self, value: T) -> None:
        """Give the value to whoever waits."""
        self._values.append(value)
        self._done.set()
        if not self._waiting and self._abandon is not None:
            self._abandon(value)

    def fail(self, error: MeshError) -> None:
        """Give the error to whoever waits."""
        self._error = error
        self._done.set()

    async def result(self) -> T:
        """The value, or the error, each time a fresh one; waiting may be cancelled."""
        self._waiting += 1
        try:
            await self._done.wait()
        finally:
            self._waiting -= 1
        if self._error is not None:
            raise type(self._error)(*self._error.args)
        return self._values[0]
