"""What the gateway's market makes of its coordinator: refusals, forgeries, silence, receipts."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from market_place import Place, buy, open_place, refused, spoken, until
from provider_actor import Job, peer_of, signer_of
from trio.testing import MockClock

from pinaivu_gateway import jobs
from pinaivu_node.protocol.ids import digest_of
from pinaivu_node.protocol.market import Outcome, RefusalReason
from pinaivu_node.protocol.wire import encode


@pytest.fixture
async def place(autojump_clock: MockClock) -> AsyncIterator[Place]:
    async with open_place() as opened:
        yield opened


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (RefusalReason.UNKNOWN_MODEL, jobs.UnknownModel),
        (RefusalReason.NO_BIDS, jobs.NoBids),
        (RefusalReason.NOBODY_ELIGIBLE, jobs.NobodyEligible),
        (RefusalReason.NO_CREDIT, jobs.NoCredit),
        (RefusalReason.DUPLICATE, jobs.JobInvalid),
        (RefusalReason.OVERLOADED, jobs.Overloaded),
        (RefusalReason.INVALID, jobs.JobInvalid),
        (RefusalReason.DEADLINE_PASSED, jobs.DeadlinePassed),
    ],
)
async def test_every_refusal_is_an_error_of_its_own(place: Place, autojump_clock, reason, error):
    await place.provider("a")
    market = await place.market()
    place.coordinator.refusals = [refused(reason)]
    with pytest.raises(error) as caught:
        await buy(place, market)
    assert type(caught.value) is error
    assert f"because of {reason.value}" in str(caught.value)
    assert not place.coordinator.deliveries


async def test_a_busy_moment_is_waited_out_and_a_busy_minute_is_not(place: Place, autojump_clock):
    await place.provider("a")
    market = await place.market()
    busy = refused(RefusalReason.NO_BIDS, retry_after_ms=1000)
    place.coordinator.refusals = [busy, busy]
    assert (await buy(place, market))[0] == "The sea is wide."
    place.coordinator.refusals = [busy] * 3
    with pytest.raises(jobs.NoBids) as caught:
        await buy(place, market)
    assert caught.value.retry_after_ms == 1000


async def test_a_prompt_that_fits_nobodys_window_is_told_apart_from_nobody_being_there(
    place: Place,
    autojump_clock,
):
    await place.provider("a")
    market = await place.market()
    place.coordinator.refusals = [refused(RefusalReason.NO_BIDS)]
    with pytest.raises(jobs.PromptTooLong):
        await buy(place, market, input_estimate=9000, input_limit=40_000)


@pytest.mark.parametrize(
    "forgery",
    [
        {"gateway": peer_of("stranger")},
        {"input_commitment": digest_of(b"another prompt")},
        {"sampling_digest": digest_of(b"other sampling")},
        {"model": "other:1b"},
        {"output_limit": 21},
        {"deadline": 1},
        {"provider": peer_of("denied")},
    ],
    ids=str,
)
async def test_a_token_that_is_not_for_this_job_is_never_dispatched(
    place: Place, autojump_clock, forgery: dict
):
    provider = await place.provider("a")
    market = await place.market()
    place.coordinator.forge = lambda token: token.model_copy(update=forgery)
    order = place.order(deny=(peer_of("denied"),))
    with pytest.raises(jobs.CoordinatorUnreachable, match="protocol"):
        async with market.buy(order):
            pass
    assert not provider.jobs
    assert (await place.delivery(order)).segments == ()


async def test_a_token_signed_by_another_is_never_dispatched(place: Place, autojump_clock):
    provider = await place.provider("a")
    market = await place.market()
    place.coordinator.sign_with = signer_of("stranger")
    with pytest.raises(jobs.CoordinatorUnreachable):
        await buy(place, market)
    assert not provider.jobs


async def test_a_coordinator_that_does_not_answer_is_not_waited_for(place: Place, autojump_clock):
    await place.provider("a")
    market = await place.market()
    place.coordinator.is_mute = True
    started = trio.current_time()
    with pytest.raises(jobs.CoordinatorUnreachable, match="does not answer"):
        await buy(place, market)
    assert trio.current_time() - started == pytest.approx(5, abs=0.1)


async def test_a_coordinator_that_falls_silent_is_noticed_after_three_heartbeats(
    place: Place, autojump_clock
):
    await place.provider("a")
    market = await place.market()
    assert len(market.providers()) == 1
    assert market.statistics().balance == 12345
    place.coordinator.beats = False
    await until(lambda: not market.statistics().coordinator_connected, within=4.5)
    assert list(market.providers()) == []


async def test_a_stream_outlives_the_coordinator_and_is_signed_for_when_it_is_back(
    place: Place, autojump_clock
):
    async def take_time(job: Job) -> None:
        await job.accept()
        for text in ("The ", "sea ", "is ", "wide."):
            await job.tokens(text)
            await trio.sleep(1)
        await job.done()

    await place.provider("a", take_time)
    market = await place.market()
    order = place.order()
    async with market.buy(order) as job:
        place.kill("coordinator")
        text, _ = await spoken(job)
    assert text == "The sea is wide."
    await until(lambda: order.request_id in place.outbox.kept)
    with pytest.raises(jobs.CoordinatorUnreachable):
        await buy(place, market)
    await place.start_coordinator()
    assert (await place.delivery(order)).outcome is Outcome.COMPLETED
    await until(lambda: not place.outbox.kept)


async def test_a_delivery_is_sent_until_there_is_a_receipt(place: Place, autojump_clock):
    await place.provider("a")
    market = await place.market()
    place.coordinator.acknowledges = False
    order = place.order()
    async with market.buy(order) as job:
        await spoken(job)
    await until(lambda: place.coordinator.delivered_times[order.request_id] >= 2, within=20)
    assert market.statistics().deliveries_waiting == 1
    place.coordinator.acknowledges = True
    await until(lambda: not place.outbox.kept, within=20)
    assert market.statistics().deliveries_waiting == 0


async def test_what_an_earlier_life_left_unsettled_is_sent_first(place: Place, autojump_clock):
    await place.provider("a")
    market = await place.market()
    place.coordinator.acknowledges = False
    order = place.order()
    async with market.buy(order) as job:
        await spoken(job)
    await place.delivery(order)
    place.kill("gateway")
    place.coordinator.deliveries.clear()
    place.coordinator.acknowledges = True
    await place.market()
    await place.delivery(order)
    await until(lambda: not place.outbox.kept)


async def test_a_disk_that_fails_costs_no_delivery(place: Place, autojump_clock):
    await place.provider("a")
    market = await place.market()
    place.outbox.broken = True
    order = place.order()
    async with market.buy(order) as job:
        await spoken(job)
    assert (await place.delivery(order)).outcome is Outcome.COMPLETED


async def test_a_receipt_is_waited_for_and_verified(place: Place, autojump_clock):
    await place.provider("a")
    market = await place.market()
    order = place.order()
    nothing = await market.receipt(order.request_id, wait_ms=0)
    assert nothing.receipt is None
    replies = []

    async def wait() -> None:
        replies.append(await market.receipt(order.request_id, wait_ms=10_000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(0.1)
        async with market.buy(order) as job:
            await spoken(job)
    assert replies[0].receipt is not None
    assert await market.bid_set(order.request_id) == (b"leaf",)
    # One that the coordinator did not sign is none.
    forged = signer_of("stranger").seal(place.coordinator.receipt(order.request_id))
    place.coordinator.log[order.request_id] = replies[0].model_copy(update={"receipt": forged})
    with pytest.raises(jobs.CoordinatorUnreachable):
        await market.receipt(order.request_id, wait_ms=0)


async def test_many_jobs_share_one_stream_to_each_provider(place: Place, autojump_clock):
    provider = await place.provider("a")
    market = await place.market()

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(buy, place, market)
    assert len(provider.jobs) == 50
    assert provider.streams == 1
    assert market.statistics().jobs_running == 0
    assert market.statistics().jobs_finished == 50


async def test_a_provider_that_leaves_the_roster_is_let_go_when_it_is_idle(
    place: Place, autojump_clock
):
    await place.provider("a")
    market = await place.market(linger=5.0)
    await buy(place, market)
    place.coordinator.winners.clear()
    assert place.coordinator.stream is not None
    await place.coordinator.stream.send(encode(place.coordinator.roster()))
    await until(lambda: not market.providers())
    await trio.sleep(15)
    place.kill("a")  # nobody redials it
    assert peer_of("a") not in place.gateway_mesh.peers()
