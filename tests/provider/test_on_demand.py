"""Selling a model that is not in memory: honestly, and to those who can wait for it."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from pinaivu_node.engine.fleet.berth import FleetModel
from pinaivu_node.engine.fleet.fleet import FleetConfig, open_fleet
from pinaivu_node.engine.fleet.residency import Residence
from pinaivu_node.engine.synthetic import SyntheticEngine
from pinaivu_node.engine.types import EngineDead, GenerationRequest, SamplingParams
from pinaivu_node.protocol.inference import Finish, RefuseReason
from pinaivu_node.protocol.market import Announce, Bid, Heartbeat, Pass, PassReason
from pinaivu_node.protocol.wire import encode_body

COLD, FAILED, WARM = Residence.COLD, Residence.FAILED, Residence.WARM


class Loading(SyntheticEngine):
    """Up after some seconds, unless its weights are damaged."""

    def __init__(self, seconds, *, damaged=False) -> None:
        super().__init__(tokens_per_second=100, ttft_ms=50, capacity=4)
        self._seconds, self._damaged = seconds, damaged

    async def wait_ready(self) -> None:
        await trio.sleep(self._seconds)
        if self._damaged:
            raise EngineDead("the weights are damaged")


@pytest.fixture
def fleet(facts):
    """`sold`, which is cold, beside `other`, which has the memory that both would need."""

    @asynccontextmanager
    async def opened(*, load_s=4.0, damaged=False):
        @asynccontextmanager
        async def sold():
            yield Loading(load_s, damaged=damaged)

        @asynccontextmanager
        async def other():
            yield Loading(0.1)

        models = [
            FleetModel("other", other, need=10),
            FleetModel(facts.model, sold, need=10, load_s=load_s, context_window=8192),
        ]
        async with open_fleet(models, FleetConfig(budget=15)) as running:
            await running.engines["other"].wait_ready()
            await trio.sleep(100)  # long enough ago that it may be displaced on a guess
            yield running.engines["other"], running.engines[facts.model]

    return opened


@pytest.fixture
def cold_market(world, fleet):
    @asynccontextmanager
    async def opened(**settings):
        async with (
            fleet(**settings) as (other, sold),
            world.market(engine=sold, on_demand=sold) as parties,
        ):
            yield other, sold, *parties

    return opened


async def ask(coordinator, kind, **terms):
    offer = await coordinator.offer(**terms)
    return await coordinator.wait_for(kind, request_id=offer.terms.request_id)


async def test_a_cold_model_is_announced_and_its_bid_says_what_loading_takes(
    autojump_clock, cold_market
):
    async with cold_market() as (_, sold, coordinator, provider, _):
        announce = await coordinator.wait_for(Announce)
        assert announce.models[0].context_window == 8192
        bid = await ask(coordinator, Bid)
        assert bid.delay_ms == 4000
        assert sold.standing().residence is COLD, "a bid alone loads nothing"
        shown = provider.statistics().models[0].standing
        assert (shown.residence, shown.delay_ms) == (COLD, 4000)


async def test_a_job_for_a_cold_model_is_accepted_while_it_is_loaded(autojump_clock, cold_market):
    async with cold_market(load_s=6.0) as (_, sold, coordinator, _, gateway):
        bid = await ask(coordinator, Bid)
        began = trio.current_time()
        request = await gateway.dispatch(request_id=bid.request_id)
        await gateway.until(lambda: request in gateway.accepted)
        assert trio.current_time() - began < 2.5
        await gateway.wait_tokens(request, 1)
        assert trio.current_time() - began == pytest.approx(6, abs=0.5)
        done, proof = await gateway.wait_done(request)
        assert done.finish is Finish.LENGTH
        assert proof.engine_ttft_ms >= 6000
        assert sold.standing().residence is WARM
        assert (await ask(coordinator, Bid)).delay_ms == 0


async def test_what_takes_too_long_is_passed_up_and_loaded_for_the_next_one(
    autojump_clock, cold_market
):
    async with cold_market(load_s=50.0) as (other, sold, coordinator, _, _):
        assert (await ask(coordinator, Pass)).reason is PassReason.ENGINE_UNAVAILABLE
        assert other.standing().residence is COLD
        await trio.sleep(30)
        assert 15_000 < (await ask(coordinator, Bid)).delay_ms <= 20_000
        await sold.wait_ready()
        assert (await ask(coordinator, Bid)).delay_ms == 0


async def test_a_deadline_before_the_model_is_there_is_not_bid_on(
    autojump_clock, cold_market, world
):
    async with cold_market() as (_, _, coordinator, _, _):
        soon = world.clock() + 3000
        assert (await ask(coordinator, Pass, deadline=soon)).reason is PassReason.ENGINE_UNAVAILABLE


async def test_without_memory_it_is_full_and_the_coordinator_hears_when_there_is_some(
    autojump_clock, cold_market
):
    async with cold_market() as (other, _, coordinator, _, gateway):
        await ask(coordinator, Bid)
        long = GenerationRequest("long", "hello", SamplingParams(1000))
        async with other.generate(long) as events:
            await trio.sleep(2)
            loads = [each.loads for each in coordinator.heard if isinstance(each, Heartbeat)][-1]
            assert loads[0].running == 1, "of one place, until it is known how many it has"
            assert (await ask(coordinator, Pass)).reason is PassReason.FULL
            refuse = await gateway.wait_refused(await gateway.dispatch())
            assert refuse.reason is RefuseReason.FULL
            assert "no memory for it while other is in use" in refuse.explanation
            async for _ in events:
                pass
        await ask(coordinator, Bid)


async def test_a_model_that_cannot_be_loaded_is_taken_off_sale_with_the_reason_shown(
    autojump_clock, cold_market
):
    async with cold_market(damaged=True, load_s=1.0) as (_, _, coordinator, provider, gateway):
        refuse = await gateway.wait_refused(await gateway.dispatch())
        assert refuse.reason is RefuseReason.ENGINE_UNAVAILABLE
        assert "the weights are damaged" in refuse.explanation
        shown = provider.statistics().models[0]
        assert (shown.standing.residence, shown.ready) == (FAILED, False)
        assert shown.standing.reason == "the weights are damaged"
        await coordinator.wait_for(Announce, models=())
        assert (await ask(coordinator, Pass)).reason is PassReason.ENGINE_UNAVAILABLE


async def test_a_load_that_fails_after_the_job_was_accepted_ends_it_as_a_failure(
    autojump_clock, cold_market
):
    async with cold_market(damaged=True) as (_, _, _, _, gateway):
        request = await gateway.dispatch()
        done, proof = await gateway.wait_done(request)
        assert request in gateway.accepted
        assert done.finish is Finish.ERROR
        assert "the weights are damaged" in done.explanation
        assert proof.usage.output == 0


async def test_a_job_may_be_cancelled_while_its_model_is_loaded(autojump_clock, cold_market):
    async with cold_market() as (_, sold, _, provider, gateway):
        request = await gateway.dispatch()
        await trio.sleep(1)
        await gateway.cancel(request)
        done, _ = await gateway.wait_done(request)
        assert done.finish is Finish.CANCELLED
        assert provider.statistics().models[0].running == 0
        await sold.wait_ready()
        assert sold.standing().residence is WARM


async def test_a_model_that_is_always_there_says_nothing_of_a_delay(autojump_clock, world):
    async with world.market() as (coordinator, provider, _):
        bid = await ask(coordinator, Bid)
        assert bid.delay_ms == 0
        assert b"delay" not in encode_body(bid)
        assert provider.statistics().models[0].standing is None
