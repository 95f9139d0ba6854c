"""The gateway's database: API keys, unsettled deliveries, usage.

Every call is one transaction, done in a thread; when a writing one returns, it is on the disk.
Readers do not queue behind writers: a request that authenticates must not wait for the sync of
somebody's delivery.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sa
import trio
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.pool import QueuePool

from pinaivu_gateway.keys import ApiKey
from pinaivu_gateway.schema import HEAD, api_keys, deliveries, usage
from pinaivu_node.protocol.ids import RequestId, UnixMilliseconds
from pinaivu_node.protocol.signing import Envelope
from pinaivu_node.protocol.wire import decode_untrusted, encode

T = TypeVar("T")
RunSync = Callable[[Callable[[], Any]], Awaitable[Any]]
READERS: Final = 2
"""Look-ups at once: each takes 0.1 ms, and a key is looked up once a second at most."""


class StoreError(Exception):
    """The database failed; nothing of what was asked has happened."""


class KeyUnknown(Exception):
    """No key, or more than one, begins like this; the message says which."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one request used."""

    request_id: RequestId
    key_prefix: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish: str
    at: UnixMilliseconds


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
    try:
        store = Store(url, run_sync=run_sync)
    except (sa.exc.SQLAlchemyError, ImportError) as exc:
        raise StoreError(f"the database URL cannot be used: {exc}") from exc
    try:
        await store.open()
        yield store
    finally:
        with trio.CancelScope(shield=True):
            await store.close()


class Store:
    """Keys, deliveries and usage; implements `jobs.DeliveryOutbox`."""

    def __init__(self, url: str, *, run_sync: RunSync | None = None) -> None:
        """`run_sync` does one blocking call; by default in a thread."""
        self._engine: Final = _engine_at(url)
        is_sqlite = self._engine.dialect.name == "sqlite"
        self._insert: Final[Callable[[sa.Table], Any]] = (
            sqlite.insert if is_sqlite else postgresql.insert
        )
        # SQLite has one writer; elsewhere the order of deliveries is the order of the calls.
        self._write: Final[RunSync] = run_sync or partial(
            trio.to_thread.run_sync, limiter=trio.CapacityLimiter(1)
        )
        self._read: Final[RunSync] = run_sync or partial(
            trio.to_thread.run_sync, limiter=trio.CapacityLimiter(READERS)
        )

    async def open(self) -> None:
        """Bring the tables up to date."""
        await self._transact(_migrate)

    async def close(self) -> None:
        """Let the database go."""
        await self._write(self._engine.dispose)

    # --- keys ---------------------------------------------------------------------------------

    async def add_key(self, key: ApiKey) -> None:
        """Keep a new key."""
        row = {
            "hash": key.hash,
            "prefix": key.prefix,
            "name": key.name,
            "tenant": key.tenant,
            "created_at": key.created_at,
            "revoked_at": key.revoked_at,
        }
        await self._transact(lambda each: each.execute(sa.insert(api_keys).values(row)))

    async def find_key(self, key_hash: str) -> ApiKey | None:
        """The key with this hash, revoked or not."""

        def work(connection: sa.Connection) -> ApiKey | None:
            query = sa.select(api_keys).where(api_keys.c.hash == key_hash)
            row = connection.execute(query).one_or_none()
            return None if row is None else _key(row)

        return await self._look_up(work)

    async def keys(self) -> list[ApiKey]:
        """Every key, oldest first."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.prefix)
        return await self._look_up(lambda each: [_key(row) for row in each.execute(query)])

    async def revoke_key(self, prefix: str, *, now: UnixMilliseconds) -> ApiKey:
        """Revoke the one key that begins like this; harmless to repeat.  Raises KeyUnknown."""

        def work(connection: sa.Connection) -> ApiKey:
            query = sa.select(api_keys).where(api_keys.c.prefix.startswith(prefix, autoescape=True))
            found = [_key(row) for row in connection.execute(query)]
            if len(found) != 1:
                count = f"{len(found)} keys begin" if found else "no key begins"
                raise KeyUnknown(f"{count} with {prefix!r}; `keys list` shows them all")
            if found[0].revoked_at is None:
                connection.execute(
                    sa.update(api_keys)
                    .where(api_keys.c.hash == found[0].hash)
                    .values(revoked_at=now)
                )
            return found[0]

        return await self._transact(work)

    # --- deliveries ---------------------------------------------------------------------------

    async def put(self, request_id: RequestId, delivery: Envelope) -> None:
        """Durable when it returns; a second delivery of a request replaces the first."""
        data = encode(delivery)
        statement = (
            self._insert(deliveries)
            .values(request_id=request_id, envelope=data)
            .on_conflict_do_update(index_elements=["request_id"], set_={"envelope": data})
        )
        await self._transact(lambda each: each.execute(statement))

    async def remove(self, request_id: RequestId) -> None:
        """Its receipt or acknowledgement has come; harmless to repeat."""
        statement = sa.delete(deliveries).where(deliveries.c.request_id == request_id)
        await self._transact(lambda each: each.execute(statement))

    async def waiting(self) -> list[tuple[RequestId, Envelope]]:
        """Everything put and not removed, oldest first."""
        query = sa.select(deliveries).order_by(deliveries.c.id)
        return await self._look_up(
            lambda each: [
                (RequestId(row.request_id), decode_untrusted(row.envelope, Envelope))
                for row in each.execute(query)
            ]
        )

    # --- usage --------------------------------------------------------------------------------

    async def add_usage(self, rows: Sequence[UsageRow]) -> None:
        """Keep what these requests used, in one transaction."""
        if not rows:
            return
        fields = UsageRow.__slots__
        values = [{name: getattr(row, name) for name in fields} for row in rows]
        statement = self._insert(usage).on_conflict_do_nothing(index_elements=["request_id"])
        await self._transact(lambda each: each.execute(statement, values))

    async def usage(self, key_prefix: str | None = None) -> list[UsageRow]:
        """What was used, oldest first; of one key, or of all."""
        query = sa.select(usage).order_by(usage.c.at, usage.c.request_id)
        if key_prefix is not None:
            query = query.where(usage.c.key_prefix == key_prefix)
        return await self._look_up(
            lambda each: [UsageRow(**row._asdict()) for row in each.execute(query)]
        )

    async def _transact(self, work: Callable[[sa.Connection], T]) -> T:
        result: T = await self._write(partial(self._run, work, is_writing=True))
        return result

    async def _look_up(self, work: Callable[[sa.Connection], T]) -> T:
        result: T = await self._read(partial(self._run, work, is_writing=False))
        return result

    def _run(self, work: Callable[[sa.Connection], T], *, is_writing: bool) -> T:
        try:
            opened = self._engine.connect().execution_options(is_writing=is_writing)
            with opened as connection, connection.begin():
                return work(connection)
        except sa.exc.SQLAlchemyError as exc:
            raise StoreError(f"the database failed: {str(exc).splitlines()[0][:200]}") from exc


def _engine_at(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    is_sqlite = parsed.get_backend_name() == "sqlite"
    engine = sa.create_engine(
        parsed,
        poolclass=QueuePool,
        pool_size=1 + READERS,
        max_overflow=0,
        pool_pre_ping=not is_sqlite,  # a restarted server is noticed before it matters
    )
    if is_sqlite:
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, record: object) -> None:
    del record
    connection.isolation_level = None  # we say BEGIN ourselves
    for pragma in (
        "busy_timeout=5000",  # `keys create` runs beside the server
        "journal_mode=WAL",
        "synchronous=FULL",  # a delivery that was put survives a power cut
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A deferred BEGIN would take the write lock at the first write and could fail halfway.
    is_writing = connection.get_execution_options().get("is_writing", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


def _key(row: sa.Row[Any]) -> ApiKey:
    return ApiKey(
        hash=row.hash,
        prefix=row.prefix,
        name=row.name,
        tenant=bytes(row.tenant),
        created_at=UnixMilliseconds(row.created_at),
        revoked_at=None if row.revoked_at is None else UnixMilliseconds(row.revoked_at),
    )


def _migrate(connection: sa.Connection) -> None:
    if sa.inspect(connection).has_table("alembic_version"):
        version = connection.execute(sa.text("SELECT version_num FROM alembic_version"))
        if version.scalar_one_or_none() == HEAD:
            return
    # Only here: loading alembic takes longer than opening a database that is up to date.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "pinaivu_gateway:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
