"""Keys, deliveries and usage on SQLite, and on PostgreSQL where one is given."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import trio
from counting_market import PROVIDERS
from http_client import new_key
from postgres import binaries, running_server

from pinaivu_gateway.keyring import Keyring
from pinaivu_gateway.schema import metadata
from pinaivu_gateway.store import (
    KeyUnknown,
    Store,
    StoreError,
    UsageRow,
    open_store,
    run_inline,
    sqlite_url,
)
from pinaivu_gateway.usage_log import FLUSH_SECONDS, UsageLog
from pinaivu_node.protocol.ids import digest_of, request_id_of
from pinaivu_node.protocol.market import Delivery, Outcome


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    folder = binaries()
    if folder is None:
        pytest.skip("no PostgreSQL server is installed: run scripts/postgres-for-tests as root")
    with running_server(folder) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "gateway.db")
    server: str = request.getfixturevalue("server")
    engine = sa.create_engine(sa.make_url(server).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    engine.dispose()
    return server


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    async with open_store(url) as opened:
        yield opened


def delivery(number: int):
    message = Delivery(
        request_id=request_id_of(bytes([number]) * 16),
        gateway=PROVIDERS[0].peer_id,
        segments=(),
        outcome=Outcome.COMPLETED,
        output_hash=digest_of(b""),
    )
    return message.request_id, PROVIDERS[0].seal(message)


def usage_row(number: int, prefix: str = "sk-pnv-a") -> UsageRow:
    return UsageRow(request_id_of(bytes([number]) * 16), prefix, "m", 9, 2, 4, "stop", number)


async def test_a_key_is_found_by_its_hash_and_kept_without_its_secret(store: Store, url: str):
    key, record = new_key("laptop")
    await store.add_key(record)
    assert await store.find_key(record.hash) == record
    assert await store.find_key("0" * 64) is None
    assert await store.keys() == [record]
    assert key not in repr(await store.keys())


async def test_a_key_is_revoked_by_how_it_begins(store: Store):
    records = [new_key(name)[1] for name in ("a", "b")]
    for record in records:
        await store.add_key(record)
    await store.revoke_key(records[0].prefix, now=1000)
    await store.revoke_key(records[0].prefix, now=2000)
    found = await store.find_key(records[0].hash)
    assert found is not None
    assert found.revoked_at == 1000
    with pytest.raises(KeyUnknown, match="2 keys begin"):
        await store.revoke_key("sk-pnv-", now=1)
    for wrong in ("sk-pnv-%", "sk-pnv-________", "nothing"):
        with pytest.raises(KeyUnknown, match="no key begins"):
            await store.revoke_key(wrong, now=1)


async def test_deliveries_wait_in_order_until_removed(store: Store):
    first, second = delivery(2), delivery(1)
    await store.put(*first)
    await store.put(*second)
    await store.put(*first)
    assert await store.waiting() == [first, second]
    await store.remove(first[0])
    await store.remove(first[0])
    assert await store.waiting() == [second]


async def test_deliveries_outlive_the_process(url: str):
    async with open_store(url) as store:
        await store.put(*delivery(1))
    async with open_store(url) as store:
        assert await store.waiting() == [delivery(1)]


async def test_usage_is_kept_once(store: Store):
    await store.add_usage([])
    await store.add_usage([usage_row(1), usage_row(2, "sk-pnv-b")])
    await store.add_usage([usage_row(1)])
    assert await store.usage() == [usage_row(1), usage_row(2, "sk-pnv-b")]
    assert await store.usage("sk-pnv-b") == [usage_row(2, "sk-pnv-b")]


async def test_tables_are_what_the_migrations_make(store: Store, url: str):
    engine = sa.create_engine(url)
    inspector = sa.inspect(engine)
    for table in metadata.sorted_tables:
        found = {column["name"] for column in inspector.get_columns(table.name)}
        assert found == {column.name for column in table.columns}
    engine.dispose()


async def test_what_is_put_is_synced_to_the_disk(tmp_path: Path):
    async with open_store(sqlite_url(tmp_path / "gateway.db")) as store:
        settings = await store._look_up(
            lambda each: [
                each.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous")
            ]
        )
    assert settings == ["wal", 2]


async def test_readers_do_not_wait_for_a_writer(tmp_path: Path):
    url = sqlite_url(tmp_path / "gateway.db")
    async with open_store(url) as store:
        _, record = new_key()
        await store.add_key(record)
        other = sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with trio.fail_after(2):
            assert await store.find_key(record.hash) == record
        other.close()


@pytest.mark.parametrize("url_", ["sqlite:////no/such/folder/x.db", "nonsense", "mysql://x/y"])
async def test_a_database_that_cannot_be_used_is_an_error_of_ours(url_: str):
    with pytest.raises(StoreError):
        async with open_store(url_):
            pass


async def test_a_revocation_by_another_process_is_noticed_within_a_second(
    autojump_clock, tmp_path: Path
):
    url = sqlite_url(tmp_path / "gateway.db")
    async with (
        open_store(url, run_sync=run_inline) as ours,
        open_store(url, run_sync=run_inline) as theirs,
    ):
        key, record = new_key()
        keyring = Keyring(ours)
        assert await keyring.find(key) is None
        await theirs.add_key(record)
        assert await keyring.find(key) == record, "a new key works at once"
        await theirs.revoke_key(record.prefix, now=record.created_at)
        await trio.sleep(0.9)
        assert await keyring.find(key) == record
        await trio.sleep(0.2)
        assert await keyring.find(key) is None


async def test_a_remembered_key_touches_no_database(autojump_clock, tmp_path: Path):
    calls = 0

    async def counted(work):
        nonlocal calls
        calls += 1
        return await run_inline(work)

    async with open_store(sqlite_url(tmp_path / "gateway.db"), run_sync=counted) as store:
        key, record = new_key()
        await store.add_key(record)
        keyring = Keyring(store)
        await keyring.find(key)
        before = calls
        for _ in range(100):
            assert await keyring.find(key) == record
        assert calls == before


async def test_usage_waits_for_a_database_that_is_away(autojump_clock, tmp_path: Path):
    is_away = False

    async def flaky(work):
        if is_away:
            raise StoreError("away")
        return await run_inline(work)

    async with (
        open_store(sqlite_url(tmp_path / "gateway.db"), run_sync=flaky) as store,
        trio.open_nursery() as nursery,
    ):
        log = UsageLog(store)
        await nursery.start(log.run)
        is_away = True
        log.record(usage_row(1))
        await trio.sleep(1.5 * FLUSH_SECONDS)
        assert log.statistics().rows_waiting == 1
        is_away = False
        await trio.sleep(FLUSH_SECONDS)
        assert await store.usage() == [usage_row(1)]
        assert log.statistics().rows_waiting == 0
        log.record(usage_row(2))
        nursery.cancel_scope.cancel()
    async with open_store(sqlite_url(tmp_path / "gateway.db"), run_sync=run_inline) as store:
        assert await store.usage() == [usage_row(1), usage_row(2)]
