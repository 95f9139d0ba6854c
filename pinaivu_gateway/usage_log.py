"""Usage on its way to the database: gathered for a second, written in one transaction.

A crash loses a second of it.  That is allowed, because receipts are what is billed; a transaction
per request is not, because it would cost each of them a sync of the disk.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from pinaivu_gateway.store import Store, StoreError, UsageRow

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # its stubs of trio, which libp2p installs, know no other

logger = logging.getLogger(__name__)

FLUSH_SECONDS: Final = 1.0
MOST_WAITING: Final = 100_000
"""Rows of about 200 bytes: minutes of a database that is away."""


@dataclass(frozen=True, slots=True)
class UsageStatistics:
    """For the metrics page."""

    rows_waiting: int
    rows_dropped: int


class UsageLog:
    """Rows that wait to be written."""

    def __init__(self, store: Store) -> None:
        self._store: Final = store
        self._waiting: list[UsageRow] = []
        self._dropped = 0

    def record(self, row: UsageRow) -> None:
        """Take a row; it is dropped and counted if too many wait."""
        if len(self._waiting) >= MOST_WAITING:
            self._dropped += 1
        else:
            self._waiting.append(row)

    def statistics(self) -> UsageStatistics:
        """A snapshot."""
        return UsageStatistics(len(self._waiting), self._dropped)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what waits, every second, until cancelled; then once more."""
        task_status.started()
        try:
            while True:
                await trio.sleep(FLUSH_SECONDS)
                await self.flush()
        finally:
            # 5 s: a database that is away must not keep the gateway from stopping.
            with trio.move_on_after(5) as scope:
                scope.shield = True
                await self.flush()

    async def flush(self) -> None:
        """Write what waits now; if the database fails it goes on waiting."""
        rows = self._waiting[:]
        try:
            await self._store.add_usage(rows)
        except StoreError as exc:
            logger.warning("usage of %d requests cannot be written yet: %s", len(rows), exc)
        else:
            # Only now: a cancelled flush is repeated, and writing a row twice is harmless.
            del self._waiting[: len(rows)]
