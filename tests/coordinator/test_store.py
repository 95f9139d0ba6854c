from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
import trio
from market_town import DIGEST, START, make_report, request_id, signer_of
from postgres import binaries, running_server

from pinaivu_node.coordinator.ledger import (
    TREASURY,
    OverdraftError,
    Share,
    deposit_entry,
    gateway_account,
    hold_account,
    hold_entry,
    settle_entry,
    welcome_entry,
)
from pinaivu_node.coordinator.reputation import Subject, Track
from pinaivu_node.coordinator.schema import HEAD, accounts, metadata, postings
from pinaivu_node.coordinator.store import (
    DuplicateJobError,
    NewJob,
    Prospect,
    Settlement,
    Store,
    StoreError,
    open_store,
    sqlite_url,
)

GATEWAY, PROVIDER = signer_of("gateway").peer_id, signer_of("provider").peer_id
SUBJECT = Subject(PROVIDER, DIGEST)
TRACK = Track().after(make_report(PROVIDER), now=START)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    folder = binaries()
    if folder is None:
        pytest.skip("no PostgreSQL server is installed: run scripts/postgres-for-tests as root")
    with running_server(folder) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "books.db")
    server = request.getfixturevalue("server")
    engine = sa.create_engine(sa.make_url(server).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return server


@pytest.fixture
async def store(url):
    async with open_store(url) as opened:
        yield opened


def new_job(number: int = 1, *, hold: int = 100) -> NewJob:
    return NewJob(
        request_id=request_id(number),
        gateway=GATEWAY,
        hold=hold,
        hold_entry=hold_entry(GATEWAY, request_id(number), hold),
        awarded_at=START,
        award=b"award",
        bid_set=b"bids",
    )


def settlement(number: int = 1, *, hold: int = 100, amount: int = 30) -> Settlement:
    shares = [Share(PROVIDER, amount, 1)]
    return Settlement(
        request_id=request_id(number),
        entry=settle_entry(GATEWAY, request_id(number), hold=hold, shares=shares),
        receipt_reply=lambda entry: f"receipt {entry}".encode(),
        tracks={SUBJECT: TRACK},
        settled_at=START + 1,
    )


async def fund(store: Store, amount: int = 1000) -> None:
    await store.post(deposit_entry(GATEWAY, amount, key="fund"), now=START)


async def check_books(store: Store) -> None:
    """What must be true of the books at every moment, whatever went wrong before."""
    balances = await store.accounts()
    assert sum(balances.values()) == 0
    assert all(balance > 0 for account, balance in balances.items() if account != TREASURY)

    def summed(connection: sa.Connection) -> dict[str, int]:
        total = sa.func.sum(postings.c.amount)
        rows = connection.execute(sa.select(postings.c.account, total).group_by("account"))
        return {account: int(amount) for account, amount in rows if amount}

    assert await store._transact(summed) == balances
    open_holds = {hold_account(request_id(n)) for n in range(1, 10)} & set(balances)
    assert len(open_holds) == len(await store.open_jobs())


async def test_a_job_is_held_captured_and_released(store):
    await fund(store)
    await store.add_job(new_job())
    assert await store.balance(gateway_account(GATEWAY)) == 900
    assert await store.balance(hold_account(request_id())) == 100
    [job] = await store.open_jobs()
    assert (job.hold, job.award, job.bid_set) == (100, b"award", b"bids")
    reply = await store.settle(settlement())
    assert reply == b"receipt 3" == await store.receipt_reply(request_id())
    assert await store.open_jobs() == []
    assert await store.accounts() == {
        TREASURY: -1000, gateway_account(GATEWAY): 970, f"provider:{PROVIDER}": 29, "fee": 1,
    }  # fmt: skip
    await check_books(store)


async def test_a_receipt_is_written_once(store):
    await fund(store)
    await store.add_job(new_job())
    first = await store.settle(settlement())
    again = replace(settlement(amount=99), receipt_reply=lambda _: b"another receipt")
    assert await store.settle(again) == first
    await check_books(store)


async def test_no_gateway_can_hold_more_than_it_has(store):
    await fund(store, 150)
    await store.add_job(new_job(1))
    with pytest.raises(OverdraftError) as caught:
        await store.add_job(new_job(2))
    assert (caught.value.balance, caught.value.needed) == (50, 100)
    assert await store.bid_set(request_id(2)) is None
    assert await store.prospect(GATEWAY, request_id(2)) == Prospect(balance=50, is_known=False)
    await check_books(store)


async def test_a_request_id_is_good_for_one_job(store):
    await fund(store)
    await store.add_job(new_job())
    with pytest.raises(DuplicateJobError):
        await store.add_job(new_job(hold=5))
    await store.settle(settlement())
    with pytest.raises(DuplicateJobError):
        await store.add_job(new_job())
    assert (await store.prospect(GATEWAY, request_id())).is_known
    await check_books(store)


async def test_an_entry_is_posted_once(store):
    assert await store.post(welcome_entry(GATEWAY, 50), now=START)
    assert not await store.post(welcome_entry(GATEWAY, 70), now=START)
    assert await store.balance(gateway_account(GATEWAY)) == 50
    assert await store.post(deposit_entry(GATEWAY, 0, key="nothing"), now=START)


async def test_a_free_job_has_a_receipt_with_an_entry_of_its_own(store):
    await store.add_job(new_job(hold=0))
    free = replace(
        settlement(), entry=settle_entry(GATEWAY, request_id(), hold=0, shares=[]), tracks={}
    )
    assert await store.settle(free) == b"receipt 2"
    assert await store.accounts() == {}


async def test_what_was_measured_and_who_is_banned_survives(url):
    async with open_store(url) as store:
        await fund(store)
        await store.add_job(new_job())
        await store.settle(settlement())
        await store.ban(PROVIDER, until=START + 10, reason="test")
        await store.ban(PROVIDER, until=START + 20, reason="test")
    async with open_store(url) as store:
        assert await store.tracks() == [(SUBJECT, TRACK)]
        assert await store.bans(now=START + 19) == {PROVIDER: START + 20}
        assert await store.bans(now=START + 20) == {}
        await check_books(store)


async def test_the_migrations_lead_to_the_tables_that_are_used(url):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    async with open_store(url) as store:

        def differences(connection: sa.Connection) -> list[object]:
            context = MigrationContext.configure(connection)
            assert context.get_current_revision() == HEAD
            return compare_metadata(context, metadata)

        assert await store._transact(differences) == []


async def test_the_database_itself_refuses_an_overdraft(store):
    def overdraw(connection: sa.Connection) -> None:
        connection.execute(sa.insert(accounts).values(name="gateway:x", balance=-1))

    with pytest.raises(StoreError):
        await store._transact(overdraw)


# --- crashes --------------------------------------------------------------------------------------


class Crash(Exception):
    pass


@contextlib.contextmanager
def crashing_at(store: Store, step: int) -> Iterator[list[str]]:
    """Break off before the n-th statement, counted from 0; the commit is the last one."""
    engine, done = store._books.engine, []

    def count(what: str) -> None:
        if len(done) == step:
            raise Crash(what)
        done.append(what)

    def on_statement(connection, cursor, statement, *rest):
        count(statement)

    def on_commit(connection):
        count("COMMIT")

    sa.event.listen(engine, "before_cursor_execute", on_statement)
    sa.event.listen(engine, "commit", on_commit)
    try:
        yield done
    finally:
        sa.event.remove(engine, "before_cursor_execute", on_statement)
        sa.event.remove(engine, "commit", on_commit)


async def crash_everywhere(url, work) -> int:
    """Do `work` with a crash at each of its steps, open the books again, and do it in the end."""
    for step in range(100):
        async with open_store(url) as store:
            before = await store.accounts()
            with crashing_at(store, step) as done:
                try:
                    await work(store)
                except Crash:
                    pass
                else:
                    assert "COMMIT" in done
                    return step
        async with open_store(url) as store:
            assert await store.accounts() == before
            await check_books(store)
    raise AssertionError("it never ended")


async def test_a_crash_at_any_write_leaves_the_books_whole(url):
    async with open_store(url) as store:
        await fund(store)
    assert await crash_everywhere(url, lambda store: store.add_job(new_job())) >= 6
    assert await crash_everywhere(url, lambda store: store.settle(settlement())) >= 8
    async with open_store(url) as store:
        assert await store.receipt_reply(request_id()) is not None
        assert (await store.accounts())[gateway_account(GATEWAY)] == 970
        await check_books(store)


async def test_a_process_that_is_killed_leaves_the_books_whole(tmp_path):
    url = sqlite_url(tmp_path / "books.db")
    async with open_store(url) as store:
        await fund(store, 10**9)
    command = [sys.executable, str(Path(__file__).with_name("busy_books.py")), url]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, stdout=subprocess.PIPE, check=False)
        process = await nursery.start(run, command)
        assert await process.stdout.receive_some(1) == b"b"
        process.kill()
    async with open_store(url) as store:
        balances = await store.accounts()
        assert sum(balances.values()) == 0
        assert balances["fee"] >= 20  # it was busy
        holds = [account for account in balances if account.startswith("hold:")]
        assert len(holds) == len(await store.open_jobs()) <= 1


async def test_a_failing_signature_leaves_no_trace(store):
    await fund(store)
    await store.add_job(new_job())

    def fail(entry: int) -> bytes:
        raise Crash

    with pytest.raises(Crash):
        await store.settle(replace(settlement(), receipt_reply=fail))
    assert len(await store.open_jobs()) == 1
    await check_books(store)


async def test_a_database_that_cannot_be_opened_says_so(tmp_path):
    (tmp_path / "books.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        async with open_store(sqlite_url(tmp_path / "books.db")):
            pass


@pytest.mark.parametrize(
    "url", ["foo://user:secret@bar", "nonsense", "mysql+nothing://bar", "postgresql://h:port/x"]
)
async def test_a_url_that_means_nothing_is_answered_with_how_to_write_it(url):
    with pytest.raises(StoreError, match="write it like sqlite:///") as caught:
        async with open_store(url):
            pass
    assert "secret" not in str(caught.value)
