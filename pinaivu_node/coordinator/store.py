"""The door to the books: every call is one durable transaction, done in a thread, one at a time.

When a call returns, what it wrote is on the disk.  A call that was begun is finished even if its
caller is cancelled meanwhile; one that waits its turn is simply not done.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sa
import trio

from pinaivu_node.coordinator.books import (
    Books,
    DuplicateJobError,
    NewJob,
    Settlement,
    StoredJob,
    StoreError,
)
from pinaivu_node.coordinator.ledger import Account, Entry, gateway_account
from pinaivu_node.coordinator.reputation import Subject, Track
from pinaivu_node.protocol.ids import PeerId, RequestId, UnixMilliseconds

__all__ = [
    "DuplicateJobError",
    "NewJob",
    "Prospect",
    "Settlement",
    "Store",
    "StoreError",
    "StoredJob",
    "open_store",
    "run_inline",
    "sqlite_url",
]

T = TypeVar("T")
RunSync = Callable[[Callable[[], Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Prospect:
    """What is known before a job's auction opens."""

    balance: int
    is_known: bool
    """A job of this id was awarded before."""


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """How the database has served so far."""

    transactions: int
    slowest_ms: int
    total_ms: int


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite file."""
    return f"sqlite:///{path}"


async def run_inline(work: Callable[[], T]) -> T:
    """Do `work` at once, in this thread: for virtual clocks, which run away from real threads."""
    await trio.lowlevel.checkpoint()
    return work()


@contextlib.asynccontextmanager
async def open_store(url: str, *, run_sync: RunSync | None = None) -> AsyncIterator[Store]:
    """The store at an SQLAlchemy URL, migrated to the newest tables; closed on leaving.

    Raises StoreError if the database cannot be used.
    """
    store = Store(url, run_sync=run_sync)
    try:
        await store.open()
        yield store
    finally:
        with trio.CancelScope(shield=True):
            await store.close()


class Store:
    """Accounts, jobs, receipts, measurements and bans, kept for ever."""

    def __init__(self, url: str, *, run_sync: RunSync | None = None) -> None:
        """`run_sync` does one blocking call; by default in a thread, one at a time."""
        self._books: Final = Books(url)
        # One writer: SQLite has no more, and the order of entries is the order of the calls.
        self._run_sync: Final[RunSync] = run_sync or partial(
            trio.to_thread.run_sync, limiter=trio.CapacityLimiter(1)
        )
        self._transactions = 0
        self._slowest = 0.0
        self._total = 0.0

    async def open(self) -> None:
        """Migrate; StoreError if the database cannot be used."""
        await self._run_sync(self._books.open)

    async def close(self) -> None:
        """Let the database go."""
        await self._run_sync(self._books.close)

    async def prospect(self, gateway: PeerId, request_id: RequestId) -> Prospect:
        """What a gateway has, and whether this job is new."""

        def work(connection: sa.Connection) -> Prospect:
            return Prospect(
                balance=self._books.balance(connection, gateway_account(gateway)),
                is_known=self._books.is_known(connection, request_id),
            )

        return await self._transact(work)

    async def add_job(self, job: NewJob) -> None:
        """Place the hold and keep the award.  Raises OverdraftError, DuplicateJobError."""
        await self._transact(lambda connection: self._books.add_job(connection, job))

    async def settle(self, settlement: Settlement) -> bytes:
        """Write the receipt with its postings; the encoded ReceiptReply.  Harmless to repeat."""
        return await self._transact(lambda connection: self._books.settle(connection, settlement))

    async def open_jobs(self) -> list[StoredJob]:
        """Jobs that were awarded and have no receipt."""
        return await self._transact(self._books.open_jobs)

    async def receipt_reply(self, request_id: RequestId) -> bytes | None:
        """The encoded ReceiptReply of a settled job."""
        return await self._transact(lambda each: self._books.receipt_reply(each, request_id))

    async def bid_set(self, request_id: RequestId) -> bytes | None:
        """The encoded BidSetReply of an awarded job."""
        return await self._transact(lambda each: self._books.bid_set(each, request_id))

    async def post(self, entry: Entry, *, now: UnixMilliseconds) -> bool:
        """Post an entry; False if its key was posted before.  Raises OverdraftError."""
        return await self._transact(
            lambda connection: self._books.post(connection, entry, now) is not None
        )

    async def balance(self, account: Account) -> int:
        """What an account holds."""
        return await self._transact(lambda each: self._books.balance(each, account))

    async def accounts(self) -> dict[Account, int]:
        """Every account that is not empty; they sum to zero."""
        return await self._transact(self._books.balances)

    async def tracks(self) -> list[tuple[Subject, Track]]:
        """Everything that was measured of providers."""
        return await self._transact(self._books.tracks)

    async def bans(self, *, now: UnixMilliseconds) -> dict[PeerId, UnixMilliseconds]:
        """Who is banned, until when."""
        return await self._transact(lambda each: self._books.bans(each, now))

    async def ban(self, peer: PeerId, *, until: UnixMilliseconds, reason: str) -> None:
        """Keep a ban across restarts."""
        await self._transact(lambda each: self._books.ban(each, peer, until, reason))

    def statistics(self) -> StoreStatistics:
        """Counters for the metrics page."""
        return StoreStatistics(
            self._transactions, round(1000 * self._slowest), round(1000 * self._total)
        )

    async def _transact(self, work: Callable[[sa.Connection], T]) -> T:
        started = trio.current_time()
        try:
            result: T = await self._run_sync(partial(self._books.transact, work))
            return result
        finally:
            took = trio.current_time() - started
            self._transactions += 1
            self._total += took
            self._slowest = max(self._slowest, took)
