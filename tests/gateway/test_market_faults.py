"""What the market does when disks, coordinators and clients are slow at the worst moment."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from market_place import Outbox, Place, open_place, until
from provider_actor import Job, answer_well, stop_when_cancelled
from trio.testing import MockClock

from pinaivu_gateway import jobs
from pinaivu_gateway.jobs import JobFinished, TextDelta
from pinaivu_node.protocol.ids import RequestId, UnixMilliseconds
from pinaivu_node.protocol.inference import Finish
from pinaivu_node.protocol.market import Outcome, SegmentOutcome
from pinaivu_node.protocol.signing import Envelope


@pytest.fixture
async def place(autojump_clock: MockClock) -> AsyncIterator[Place]:
    async with open_place() as opened:
        yield opened


class StuckOutbox(Outbox):
    """A disk that takes an hour for every write."""

    async def put(self, request_id: RequestId, delivery: Envelope) -> None:
        await trio.sleep(3600)
        await super().put(request_id, delivery)


async def spoken(job: jobs.Job) -> str:
    text = ""
    async for event in job.events():
        if isinstance(event, TextDelta):
            text += event.text
    return text


async def test_a_provider_whose_answer_nobody_reads_is_told_to_stop_at_once(
    place: Place, autojump_clock: MockClock
) -> None:
    """Not when the client is found dead: the task that would notice waits for that client."""

    async def flood(job: Job) -> None:
        await job.accept()
        while not job.cancelled.is_set():
            await job.tokens(*["y" * 1000] * 60)
        await job.done(Finish.CANCELLED, outcome=SegmentOutcome.CANCELLED)

    provider = await place.provider("a", flood)
    market = await place.market()
    order = place.order(max_tokens=100_000)
    async with market.buy(order):
        began = trio.current_time()
        await trio.sleep(600)
        assert provider.cancelled_at is not None
        assert provider.cancelled_at - began < 1
    delivery = await place.delivery(order)
    assert delivery.segments[0].outcome is SegmentOutcome.CANCELLED
    assert delivery.segments[0].usage.output >= 1 << 10


async def test_a_delivery_that_the_disk_does_not_take_in_time_is_told_all_the_same(
    place: Place, autojump_clock: MockClock
) -> None:
    place.outbox = StuckOutbox()
    await place.provider("a")
    market = await place.market()
    order = place.order()
    async with market.buy(order) as job:
        await spoken(job)
    assert (await place.delivery(order)).outcome is Outcome.COMPLETED


async def test_the_end_of_an_answer_waits_for_no_disk(
    place: Place, autojump_clock: MockClock
) -> None:
    place.outbox = StuckOutbox()
    await place.provider("a")
    market = await place.market()
    started = trio.current_time()
    async with market.buy(place.order()) as job:
        assert await spoken(job) == "The sea is wide."
    assert trio.current_time() - started < 0.1


async def test_an_award_that_was_lost_after_its_client_had_left_is_handed_back(
    place: Place, autojump_clock: MockClock
) -> None:
    """The coordinator holds money for it, and nobody waits for the news."""
    provider = await place.provider("a")
    market = await place.market()
    place.coordinator.is_mute = True
    order = place.order()
    with trio.move_on_after(0.5):
        async with market.buy(order):
            pass
    place.kill("coordinator")
    await until(lambda: not market.statistics().coordinator_connected)
    await place.start_coordinator()
    delivery = await place.delivery(order)
    assert (delivery.outcome, delivery.segments) == (Outcome.CANCELLED, ())
    assert not provider.jobs


async def test_an_auction_in_which_the_coordinator_is_lost_is_handed_back(
    place: Place, autojump_clock: MockClock
) -> None:
    provider = await place.provider("a")
    market = await place.market()
    place.coordinator.award_delay = 2.0

    async def kill_soon() -> None:
        await trio.sleep(0.5)
        place.kill("coordinator")

    order = place.order()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill_soon)
        with pytest.raises(jobs.CoordinatorUnreachable):
            async with market.buy(order):
                pass
    await place.start_coordinator()
    assert (await place.delivery(order)).segments == ()
    assert not provider.jobs


async def test_an_answer_without_a_token_is_an_answer(
    place: Place, autojump_clock: MockClock
) -> None:
    async def say_nothing(job: Job) -> None:
        await job.accept()
        await job.done()

    await place.provider("a", say_nothing)
    market = await place.market()
    order = place.order()
    async with market.buy(order) as job:
        events = [event async for event in job.events()]
    assert [type(event) for event in events] == [JobFinished]
    delivery = await place.delivery(order)
    assert delivery.outcome is Outcome.COMPLETED
    assert delivery.segments[0].usage.output == 0


async def test_deltas_that_wait_together_come_as_one(
    place: Place, autojump_clock: MockClock
) -> None:
    await place.provider("a", answer_well)
    market = await place.market()
    async with market.buy(place.order()) as job:
        await trio.sleep(1)
        events = [event async for event in job.events()]
    assert [type(event) for event in events] == [TextDelta, JobFinished]
    assert isinstance(events[0], TextDelta)
    assert events[0].text == "The sea is wide."
    assert len(events[0].token_ids) == 4


async def test_leaving_the_market_signs_for_what_still_ran(
    place: Place, autojump_clock: MockClock
) -> None:
    """Its client leaves with it, and its delivery is told in the next life."""
    await place.provider("a", stop_when_cancelled)
    order = place.order(max_tokens=1000)
    with trio.CancelScope() as client:
        async with trio.open_nursery() as nursery:
            market = await place.market()

            async def read() -> None:
                async with market.buy(order) as job:
                    await spoken(job)

            nursery.start_soon(read)
            await trio.sleep(1)
            assert market.statistics().jobs_running == 1
            client.cancel()
    await until(lambda: order.request_id in place.coordinator.deliveries, within=3)
    delivery = place.coordinator.deliveries[order.request_id]
    assert delivery.outcome is Outcome.CANCELLED
    assert 0 < delivery.segments[0].usage.output < 100


async def test_what_expired_while_its_predecessor_dawdled_is_not_dispatched(
    place: Place, autojump_clock: MockClock
) -> None:
    """A standby's token lives ten seconds; a winner that hangs longer leaves nobody to go to."""

    async def hang(job: Job) -> None:
        await job.accept()
        await trio.sleep_forever()

    await place.provider("slow", hang)
    standby = await place.provider("standby")
    market = await place.market()
    place.coordinator.forge = lambda token: token.model_copy(
        update={"expires_at": UnixMilliseconds(token.issued_at + 100)} if token.rank else {}
    )
    with pytest.raises(jobs.ProvidersFailed):
        async with market.buy(place.order()):
            pass
    assert not standby.jobs
