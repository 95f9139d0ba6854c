"""The coordinator's books in SQL: each method is one transaction, done whole or not at all.

Synchronous and used by one thread at a time; `store.py` is the door to it.  SQLite by default,
PostgreSQL by URL, through the same statements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.pool import QueuePool

from pinaivu_node.coordinator.ledger import Account, Entry, posted
from pinaivu_node.coordinator.reputation import Average, Subject, Track
from pinaivu_node.coordinator.schema import (
    HEAD,
    accounts,
    bans,
    bid_sets,
    entries,
    jobs,
    measurements,
    postings,
    receipts,
)
from pinaivu_node.protocol.ids import Digest, NanoX, PeerId, RequestId, UnixMilliseconds

T = TypeVar("T")


class StoreError(Exception):
    """The database failed; nothing of what was asked has happened."""


class DuplicateJobError(Exception):
    """A job with this request id was awarded before."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """An awarded job, and the entry that holds what it may cost."""

    request_id: RequestId
    gateway: PeerId
    hold: NanoX
    hold_entry: Entry
    awarded_at: UnixMilliseconds
    award: bytes
    """The Award as it will be sent."""
    bid_set: bytes
    """The BidSetReply as it will be served."""


@dataclass(frozen=True, slots=True)
class StoredJob:
    """What a job that has no receipt yet is rebuilt from."""

    hold: NanoX
    awarded_at: UnixMilliseconds
    award: bytes
    bid_set: bytes


@dataclass(frozen=True, slots=True)
class Settlement:
    """What is written when a job ends."""

    request_id: RequestId
    entry: Entry
    receipt_reply: Callable[[int], bytes]
    """Signs the receipt, given the number of its ledger entry."""
    tracks: Mapping[Subject, Track]
    settled_at: UnixMilliseconds


# Built once: putting a statement together costs more than SQLite takes to run it.
_BALANCE: Final = sa.select(accounts.c.balance).where(accounts.c.name == sa.bindparam("account"))
_JOB: Final = sa.select(jobs.c.hold).where(jobs.c.request_id == sa.bindparam("asked"))
_RECEIPT: Final = sa.select(receipts.c.reply).where(receipts.c.request_id == sa.bindparam("asked"))
_BID_SET: Final = sa.select(bid_sets.c.reply).where(bid_sets.c.request_id == sa.bindparam("asked"))
_ADD_BID_SET: Final = sa.insert(bid_sets)
_ADD_RECEIPT: Final = sa.insert(receipts)
_CLOSE_JOB: Final = (
    sa.update(jobs)
    .where(jobs.c.request_id == sa.bindparam("closed"))
    .values(settled_at=sa.bindparam("settled_at"))
)


class _OfEntry(NamedTuple):
    lock: Any
    add: Any
    set_balances: Any


def _bound(column: sa.Column[Any], number: int) -> sa.BindParameter[Any]:
    return sa.bindparam(f"{column.name}_{number}", type_=column.type)


def _bound_row(table: sa.Table, number: int) -> dict[str, sa.BindParameter[Any]]:
    return {column.name: _bound(column, number) for column in table.columns}


def _numbered(rows: Iterable[Mapping[str, object]]) -> dict[str, object]:
    """The values of `_bound_row`s."""
    return {f"{name}_{n}": value for n, row in enumerate(rows) for name, value in row.items()}


class _Statements:
    """Those that each database spells in its own way."""

    def __init__(self, insert: Callable[[sa.Table], Any]) -> None:
        self.add_entry: Final = (
            insert(entries).on_conflict_do_nothing(index_elements=["key"]).returning(entries.c.id)
        )
        self.add_job: Final = (
            insert(jobs)
            .on_conflict_do_nothing(index_elements=["request_id"])
            .returning(jobs.c.request_id)
        )
        self._insert = insert
        self._of_entries: dict[int, _OfEntry] = {}
        self.set_tracks: Final = self._upsert(insert(measurements), measurements)
        self.set_ban: Final = self._upsert(insert(bans), bans)

    def of_entry(self, size: int) -> _OfEntry:
        """What posts an entry of so many postings: each of its steps is one statement."""
        if size not in self._of_entries:  # as many as a job has providers, and three
            numbers = range(size)
            lock = (
                sa.select(accounts.c.name, accounts.c.balance)
                .where(accounts.c.name.in_([_bound(accounts.c.name, n) for n in numbers]))
                .order_by(accounts.c.name)
                .with_for_update()
            )
            add = sa.insert(postings).values([_bound_row(postings, n) for n in numbers])
            balances = self._insert(accounts).values([_bound_row(accounts, n) for n in numbers])
            self._of_entries[size] = _OfEntry(lock, add, self._upsert(balances, accounts))
        return self._of_entries[size]

    @staticmethod
    def _upsert(statement: Any, table: sa.Table) -> Any:
        keys = [column.name for column in table.primary_key]
        rest = [column.name for column in table.columns if not column.primary_key]
        return statement.on_conflict_do_update(
            index_elements=keys, set_={name: statement.excluded[name] for name in rest}
        )


class Books:
    """One connection pool of size one."""

    def __init__(self, url: str) -> None:
        try:
            self._open(url)
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError, ValueError) as exc:
            # Not the whole URL: it may hold a password, and this goes to a log.
            raise StoreError(
                f"cannot use a database of the kind {url.partition(':')[0]!r}: write it like "
                "sqlite:///file.db or postgresql://user@host/name (the extra [postgres])"
            ) from exc

    def _open(self, url: str) -> None:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self.engine = sa.create_engine(
            parsed,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=0,
            pool_pre_ping=not self.is_sqlite,  # a restarted server is noticed before it matters
        )
        self._compiled: dict[Any, Any] = {}
        self._statements = _Statements(sqlite.insert if self.is_sqlite else postgresql.insert)
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_immediate)

    def open(self) -> None:
        """Bring the tables up to date."""
        self.transact(_migrate)

    def close(self) -> None:
        """Let the database go."""
        self.engine.dispose()

    def transact(self, work: Callable[[sa.Connection], T]) -> T:
        """Do `work` in one transaction; StoreError if the database fails."""
        try:
            with self.engine.begin() as connection:
                return work(connection)
        except sa.exc.SQLAlchemyError as exc:
            raise StoreError(f"the database failed: {str(exc).splitlines()[0][:200]}") from exc

    # --- the ledger ---------------------------------------------------------------------------

    def post(self, connection: sa.Connection, entry: Entry, now: UnixMilliseconds) -> int | None:
        """Post an entry; its number, or None if its key was posted before.

        Raises OverdraftError, which rolls the transaction back.
        """
        added: int | None = self._run(
            connection, self._statements.add_entry, {"key": entry.key, "posted_at": now}
        ).scalar_one_or_none()
        if added is None or not entry.postings:
            return added
        statements = self._statements.of_entry(len(entry.postings))
        touched = sorted(posting.account for posting in entry.postings)
        names = _numbered({"name": name} for name in touched)
        rows = self._run(connection, statements.lock, names)
        after = posted({row.name: row.balance for row in rows}, entry)
        moves = _numbered(
            {"entry_id": added, "account": posting.account, "amount": posting.amount}
            for posting in entry.postings
        )
        self._run(connection, statements.add, moves)
        balances = _numbered({"name": name, "balance": after[name]} for name in touched)
        self._run(connection, statements.set_balances, balances)
        return added

    def _run(
        self, connection: sa.Connection, statement: Any, values: Mapping[str, Any]
    ) -> sa.CursorResult[Any]:
        """Run a statement that was compiled once; `values` has the same names each time.

        For text, integers and bytes, which need no conversion, as SQLAlchemy would prepare anew.
        """
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = statement.compile(dialect=connection.dialect, column_keys=list(values))
            self._compiled[statement] = compiled
        if compiled.positiontup is None:
            return connection.exec_driver_sql(compiled.string, dict(values))
        ordered = [values[name] for name in compiled.positiontup]
        return connection.exec_driver_sql(compiled.string, tuple(ordered))

    def balance(self, connection: sa.Connection, account: Account) -> int:
        """What an account holds; zero if it was never posted to."""
        found = connection.execute(_BALANCE, {"account": account}).scalar_one_or_none()
        return int(found or 0)

    def balances(self, connection: sa.Connection) -> dict[Account, int]:
        """Every account that is not empty."""
        rows = connection.execute(sa.select(accounts).where(accounts.c.balance != 0))
        return {Account(row.name): row.balance for row in rows}

    # --- jobs ---------------------------------------------------------------------------------

    def is_known(self, connection: sa.Connection, request_id: RequestId) -> bool:
        """Whether a job with this id was ever awarded."""
        found = connection.execute(_JOB, {"asked": request_id})
        return found.first() is not None

    def add_job(self, connection: sa.Connection, job: NewJob) -> None:
        """Hold what the job may cost, and keep its award and bid set.

        Raises OverdraftError, DuplicateJobError.
        """
        added = self._run(
            connection,
            self._statements.add_job,
            {
                "request_id": job.request_id,
                "gateway": job.gateway,
                "hold": job.hold,
                "awarded_at": job.awarded_at,
                "award": job.award,
            },
        )
        if added.first() is None:
            raise DuplicateJobError(job.request_id)
        self.post(connection, job.hold_entry, job.awarded_at)
        self._run(connection, _ADD_BID_SET, {"request_id": job.request_id, "reply": job.bid_set})

    def settle(self, connection: sa.Connection, settlement: Settlement) -> bytes:
        """Capture, release, write the receipt and what was measured; the ReceiptReply.

        A job that has a receipt keeps it, and nothing else happens.
        """
        known = self.receipt_reply(connection, settlement.request_id)
        if known is not None:
            return known
        entry = self.post(connection, settlement.entry, settlement.settled_at)
        if entry is None:
            raise StoreError(f"{settlement.entry.key} is posted but has no receipt")
        reply = settlement.receipt_reply(entry)
        self._run(
            connection,
            _ADD_RECEIPT,
            {"request_id": settlement.request_id, "entry_id": entry, "reply": reply},
        )
        self._run(
            connection,
            _CLOSE_JOB,
            {"closed": settlement.request_id, "settled_at": settlement.settled_at},
        )
        self._keep_tracks(connection, settlement.tracks)
        return reply

    def open_jobs(self, connection: sa.Connection) -> list[StoredJob]:
        """Every job that has no receipt yet."""
        rows = connection.execute(
            sa.select(jobs.c.hold, jobs.c.awarded_at, jobs.c.award, bid_sets.c.reply)
            .join(bid_sets, bid_sets.c.request_id == jobs.c.request_id)
            .where(jobs.c.settled_at.is_(None))
            .order_by(jobs.c.request_id)
        )
        return [StoredJob(row.hold, row.awarded_at, row.award, row.reply) for row in rows]

    def receipt_reply(self, connection: sa.Connection, request_id: RequestId) -> bytes | None:
        """The encoded ReceiptReply; None while there is none."""
        return connection.execute(_RECEIPT, {"asked": request_id}).scalar_one_or_none()

    def bid_set(self, connection: sa.Connection, request_id: RequestId) -> bytes | None:
        """The encoded BidSetReply; None before the award."""
        return connection.execute(_BID_SET, {"asked": request_id}).scalar_one_or_none()

    # --- providers ----------------------------------------------------------------------------

    def tracks(self, connection: sa.Connection) -> list[tuple[Subject, Track]]:
        """Everything that was measured."""
        return [_track(row) for row in connection.execute(sa.select(measurements))]

    def bans(
        self, connection: sa.Connection, now: UnixMilliseconds
    ) -> dict[PeerId, UnixMilliseconds]:
        """Who is banned, until when."""
        rows = connection.execute(sa.select(bans).where(bans.c.until > now))
        return {PeerId(row.peer): UnixMilliseconds(row.until) for row in rows}

    def ban(self, connection: sa.Connection, peer: PeerId, until: int, reason: str) -> None:
        """Keep that a peer is banned; a later ban replaces an earlier one."""
        values = {"peer": peer, "until": until, "reason": reason}
        connection.execute(self._statements.set_ban, values)

    def _keep_tracks(self, connection: sa.Connection, tracks: Mapping[Subject, Track]) -> None:
        if not tracks:
            return
        rows = [_row(subject, track) for subject, track in sorted(tracks.items())]
        connection.execute(self._statements.set_tracks, rows)


def _row(subject: Subject, track: Track) -> dict[str, Any]:
    return {
        "provider": subject.provider,
        "model_digest": subject.model_digest,
        "ttft_mean": track.ttft_ms.mean,
        "ttft_weight": track.ttft_ms.weight,
        "speed_mean": track.millitokens_per_second.mean,
        "speed_weight": track.millitokens_per_second.weight,
        "reliability_mean": track.reliability_ppm.mean,
        "reliability_weight": track.reliability_ppm.weight,
        "updated_at": track.updated_at,
    }


def _track(row: sa.Row[Any]) -> tuple[Subject, Track]:
    track = Track(
        ttft_ms=Average(row.ttft_mean, row.ttft_weight),
        millitokens_per_second=Average(row.speed_mean, row.speed_weight),
        reliability_ppm=Average(row.reliability_mean, row.reliability_weight),
        updated_at=UnixMilliseconds(row.updated_at),
    )
    return Subject(PeerId(row.provider), Digest(row.model_digest)), track


def _prepare_sqlite(connection: Any, record: object) -> None:
    del record
    connection.isolation_level = None  # we say BEGIN ourselves, and IMMEDIATE
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",  # a receipt that was sent survives a power cut
        "foreign_keys=ON",
        "busy_timeout=5000",  # an operator's shell may be reading
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: sa.Connection) -> None:
    # A deferred BEGIN would take the write lock at the first write and could fail halfway.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _migrate(connection: sa.Connection) -> None:
    if sa.inspect(connection).has_table("alembic_version"):
        version = connection.execute(sa.text("SELECT version_num FROM alembic_version"))
        if version.scalar_one_or_none() == HEAD:
            return
    # Only here: loading alembic takes longer than opening a database that is up to date.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "pinaivu_node.coordinator:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
