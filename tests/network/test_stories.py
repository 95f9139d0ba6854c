"""Whole stories: every role's real code on the memory mesh, under virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from town import (
    CREDIT,
    MODEL,
    Town,
    failed_checks,
    peer_of,
    seed_of,
    settle_down,
    settled,
    spoken,
    until,
)

from pinaivu_gateway.jobs import (
    CoordinatorUnreachable,
    JobFinished,
    NoBids,
    NobodyEligible,
    NoCredit,
    UnknownModel,
)
from pinaivu_node.engine.synthetic import SyntheticEngine
from pinaivu_node.protocol.ids import digest_of
from pinaivu_node.protocol.market import Bid, Outcome, Preference
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.protocol.receipt import Receipt
from pinaivu_node.protocol.signing import Signer, open_untrusted
from pinaivu_node.protocol.topics import MARKET, jobs_topic
from pinaivu_node.protocol.wire import encode


def receipt_in(reply) -> Receipt:
    return open_untrusted(reply.receipt, Receipt, signer=peer_of("coordinator"))


async def opened(town: Town, *providers: str, **config):
    """A town with a coordinator, these providers, each dearer than the one before, a gateway."""
    coordinator = await town.coordinator(**config)
    for number, name in enumerate(providers):
        await town.provider(name, output_price=200_000_000 + 50_000_000 * number)
    market = await town.gateway()
    await until(lambda: len(market.providers()) == len(providers))
    await until(lambda: all(each.connected for each in market.providers()))
    return coordinator, market


async def test_a_job_is_bought_served_paid_and_verified_by_a_stranger(
    town: Town, autojump_clock
) -> None:
    coordinator, market = await opened(town, "cheap", "dear")
    order = town.order()
    async with market.buy(order) as job:
        assert job.provider == peer_of("cheap")
        text, finished = await spoken(job)
    assert text
    assert finished.usage.output == 20
    assert await failed_checks(market, order, answer=text) == []
    receipt = receipt_in(await settled(market, order))
    assert receipt.outcome is Outcome.COMPLETED
    assert (receipt.bids, receipt.passes) == (2, 0)
    assert receipt.output_hash == digest_of(text.encode())
    accounts = await coordinator.accounts()
    assert sum(accounts.values()) == 0
    assert accounts[f"gateway:{peer_of('gateway')}"] == CREDIT - receipt.amount
    assert accounts[f"provider:{peer_of('cheap')}"] == receipt.amount - receipt.fee
    assert not [account for account in accounts if account.startswith("hold:")]


async def test_several_answers_are_one_job_and_are_verified_together(
    town: Town, autojump_clock
) -> None:
    _, market = await opened(town, "cheap", "dear")
    order = town.order()
    sampling = order.sampling.model_copy(update={"n": 3})
    order = replace(order, sampling=sampling, output_limit=3 * order.output_limit)
    texts, ends = ["", "", ""], []
    async with market.buy(order) as job:
        async for event in job.events():
            if isinstance(event, JobFinished):
                finished = event
                continue
            texts[event.index] += event.text
            ends += [event.index] if event.finish else []
    assert sorted(ends) == [0, 1, 2]
    assert len(set(texts)) == 3
    assert finished.usage.output == 60
    assert await failed_checks(market, order, answers=tuple(texts)) == []
    (failed,) = await failed_checks(market, order, answers=tuple(reversed(texts)))
    assert failed.name == "answer"


async def test_the_auction_closes_as_soon_as_all_have_answered(town: Town, autojump_clock) -> None:
    """Five hops of 5 ms, far from the window of 400."""
    coordinator, market = await opened(town, "a", "b", "c")
    started = trio.current_time()
    async with market.buy(town.order()) as job:
        waited = trio.current_time() - started
        await spoken(job)
    assert waited < 0.1
    assert coordinator.statistics().award_ms_slowest < 50


async def test_the_loser_is_never_dispatched_to(town: Town, autojump_clock) -> None:
    await town.coordinator()
    winner = await town.provider("cheap")
    loser = await town.provider("dear", output_price=400_000_000)
    market = await town.gateway()
    await until(lambda: len(market.providers()) == 2)
    for _ in range(3):
        order = town.order()
        async with market.buy(order) as job:
            await spoken(job)
        await settled(market, order)
    assert (winner.statistics().won, loser.statistics().won) == (3, 0)
    assert loser.statistics().bids == 3
    assert loser.statistics().earnings == 0


async def test_the_winner_is_paid_what_would_have_tied(town: Town, autojump_clock) -> None:
    """Alone it would get the ceiling; with a rival it gets less, and more than it asked."""
    _, market = await opened(town, "cheap", "dear")
    order = town.order()
    async with market.buy(order) as job:
        await spoken(job)
    segment = receipt_in(await settled(market, order)).segments[0]
    assert 0 < segment.uplift_ppm < 1_000_000


async def test_a_provider_that_dies_before_its_first_token_is_replaced(
    town: Town, autojump_clock
) -> None:
    await town.coordinator()
    await town.provider("slow", engine=SyntheticEngine(ttft_ms=5000, capacity=4))
    await town.provider("steady", output_price=300_000_000)
    market = await town.gateway()
    await until(lambda: len(market.providers()) == 2)
    order = town.order()

    async def kill_soon() -> None:
        await trio.sleep(1)
        town.kill("slow")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill_soon)
        async with market.buy(order) as job:
            assert job.provider == peer_of("steady")
            assert job.failovers == 1
            text, _ = await spoken(job)
    assert await failed_checks(market, order, answer=text) == []
    receipt = receipt_in(await settled(market, order))
    assert receipt.provider == peer_of("slow")
    paid = {segment.provider: segment.amount for segment in receipt.segments}
    assert paid[peer_of("steady")] > 0
    assert paid.get(peer_of("slow"), 0) == 0


async def test_a_silent_provider_is_gone_from_the_market(town: Town, autojump_clock) -> None:
    _, market = await opened(town, "a", "b")
    town.network.hang(peer_of("a"))
    await until(lambda: len(market.providers()) == 1, within=5)
    town.network.resume(peer_of("a"))
    await until(lambda: len(market.providers()) == 2, within=10)


async def test_a_client_that_leaves_pays_for_what_it_got(town: Town, autojump_clock) -> None:
    coordinator, market = await opened(town, "a")
    order = town.order(max_tokens=1000)
    async with market.buy(order) as job:
        await trio.sleep(2)
        assert job.provider == peer_of("a")
    receipt = receipt_in(await settled(market, order))
    assert receipt.outcome is Outcome.CANCELLED
    assert 0 < receipt.segments[0].usage.output < 200
    assert receipt.amount > 0
    assert await failed_checks(market, order) == []
    assert sum((await coordinator.accounts()).values()) == 0


async def test_a_gateway_that_vanishes_leaves_no_hold(town: Town, autojump_clock) -> None:
    coordinator, market = await opened(town, "a", settlement_grace_ms=2000)
    order = town.order(max_tokens=1000)

    async def ask() -> None:
        async with market.buy(order) as job:
            await spoken(job)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(5)
        town.kill("gateway")
        nursery.cancel_scope.cancel()
    await trio.sleep(30)
    accounts = await coordinator.accounts()
    assert not [account for account in accounts if account.startswith("hold:")]
    assert sum(accounts.values()) == 0
    # Vouchers along the stream are what the provider can show for its work.
    assert accounts[f"provider:{peer_of('a')}"] > 0


async def test_a_gateway_that_restarts_is_not_waited_for(town: Town, autojump_clock) -> None:
    """It is here again, but what it was doing it has forgotten: the hold goes after the grace."""
    coordinator, market = await opened(town, "a", settlement_grace_ms=2000)
    order = town.order(max_tokens=1000)

    async def ask() -> None:
        async with market.buy(order) as job:
            await spoken(job)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(5)
        town.kill("gateway")
        nursery.cancel_scope.cancel()
    market = await town.gateway()
    await trio.sleep(6)
    accounts = await coordinator.accounts()
    assert not [account for account in accounts if account.startswith("hold:")]
    assert accounts[f"provider:{peer_of('a')}"] > 0


async def test_a_restarted_coordinator_settles_the_job_that_ran_meanwhile(
    town: Town, autojump_clock
) -> None:
    _, market = await opened(town, "a", "b")
    order = town.order(max_tokens=200)
    async with market.buy(order) as job:
        town.kill("coordinator")
        await trio.sleep(1)
        coordinator = await town.coordinator()
        text, _ = await spoken(job)
    assert await failed_checks(market, order, answer=text) == []
    accounts = await coordinator.accounts()
    assert not [account for account in accounts if account.startswith("hold:")]
    again = town.order()
    async with market.buy(again) as job:
        await spoken(job)
    assert await failed_checks(market, again) == []


async def test_without_a_coordinator_the_client_is_told_so(town: Town, autojump_clock) -> None:
    _, market = await opened(town, "a")
    town.kill("coordinator")
    await settle_down()
    with pytest.raises(CoordinatorUnreachable):
        async with market.buy(town.order()):
            pass
    assert list(market.providers()) == []
    await town.coordinator()
    await until(lambda: len(market.providers()) == 1)


async def test_every_refusal_says_what_is_missing(town: Town, autojump_clock) -> None:
    await town.coordinator(welcome_credit=1000)
    market = await town.gateway()
    await settle_down()
    with pytest.raises(UnknownModel):
        async with market.buy(town.order()):
            pass
    provider = await town.provider("a")
    await until(lambda: len(market.providers()) == 1)
    with pytest.raises(NoCredit):
        async with market.buy(town.order(max_tokens=10_000)):
            pass
    free = PriceList(input=0, cached_input=0, output=0)
    with pytest.raises((NoBids, NobodyEligible)):
        async with market.buy(town.order(max_prices=free)):
            pass
    provider.drain()
    await settle_down()
    with pytest.raises((NoBids, UnknownModel)):
        async with market.buy(town.order(max_tokens=1, output_limit=1)):
            pass


async def test_a_gateway_without_credit_bothers_nobody(town: Town, autojump_clock) -> None:
    await town.coordinator(welcome_credit=0)
    provider = await town.provider("a")
    market = await town.gateway()
    await until(lambda: len(market.providers()) == 1)
    with pytest.raises(NoCredit):
        async with market.buy(town.order()):
            pass
    assert provider.statistics().offers == 0


async def test_a_filter_that_nobody_passes_is_an_error_and_not_dropped(
    town: Town, autojump_clock
) -> None:
    _, market = await opened(town, "a", "b")
    for changes in ({"allow": ()}, {"deny": (peer_of("a"), peer_of("b"))}):
        with pytest.raises((NobodyEligible, NoBids)):
            async with market.buy(town.order(**changes)):
                pass
    async with market.buy(town.order(allow=(peer_of("b"),))) as job:
        assert job.provider == peer_of("b")
        await spoken(job)


async def test_who_minds_time_gets_the_measured_faster_one(town: Town, autojump_clock) -> None:
    await town.coordinator()
    await town.provider("slow", engine=SyntheticEngine(tokens_per_second=5, capacity=4))
    await town.provider("fast", output_price=400_000_000)
    market = await town.gateway()
    await until(lambda: len(market.providers()) == 2)
    served = []
    for preference in [Preference.BALANCED, *[Preference.LATENCY] * 12]:
        order = town.order(preference=preference)
        async with market.buy(order) as job:
            served.append(job.provider)
            await spoken(job)
        await settled(market, order)
    assert served[0] == peer_of("slow")  # nothing measured yet: the cheaper one
    assert served[-1] == peer_of("fast")


# --- cheats and noise -----------------------------------------------------------------------------


async def test_a_forged_offer_draws_no_bid(town: Town, autojump_clock) -> None:
    await town.coordinator()
    provider = await town.provider("a")
    liar = await town.stranger("liar")
    await settle_down()
    offer = Signer(seed_of("liar")).seal(
        Bid(
            request_id=town.order().request_id,
            bidder=peer_of("liar"),
            model_digest=digest_of(b"weights"),
            prices=PriceList(input=0, cached_input=0, output=0),
            context_window=1,
            warm_tokens=0,
            expires_at=1,
        )
    )
    await liar.publish(jobs_topic(MODEL), encode(offer))
    await liar.publish(jobs_topic(MODEL), b"\xff" * 1000)
    await settle_down()
    assert provider.statistics().bids == 0
    assert provider.statistics().rejected_messages >= 1


async def test_a_bid_in_anothers_name_bans_the_liar_and_changes_nothing(
    town: Town, autojump_clock
) -> None:
    coordinator, market = await opened(town, "honest")
    liar = await town.stranger("liar")
    stream = await liar.open(peer_of("coordinator"), MARKET)
    order = town.order()
    bid = Bid(
        request_id=order.request_id,
        bidder=peer_of("honest"),
        model_digest=digest_of(b"weights"),
        prices=PriceList(input=0, cached_input=0, output=0),
        context_window=8192,
        warm_tokens=0,
        expires_at=2**50,
    )
    await stream.send(encode(Signer(seed_of("liar")).seal(bid)))
    async with market.buy(order) as job:
        assert job.provider == peer_of("honest")
        await spoken(job)
    await settle_down()
    assert peer_of("coordinator") not in liar.peers()
    assert coordinator.statistics().peers["provider"] == 1


@pytest.mark.parametrize("frame", [b"", b"\x00", b"\xc1" * 50, b"\x92" + b"\xa7hello/1"])
async def test_garbage_on_the_market_stream_costs_only_its_sender(town: Town, frame: bytes) -> None:
    _, market = await opened(town, "a")
    vandal = await town.stranger("vandal")
    stream = await vandal.open(peer_of("coordinator"), MARKET)
    await stream.send(frame)
    await settle_down()
    async with market.buy(town.order()) as job:
        await spoken(job)


async def test_many_jobs_at_once_balance_to_the_nanox(town: Town, autojump_clock) -> None:
    coordinator, market = await opened(town, "a", "b", "c")
    orders = [town.order(max_tokens=5 + number) for number in range(24)]

    async def one(order) -> None:
        async with market.buy(order) as job:
            await spoken(job)
        assert await failed_checks(market, order) == []

    refused = 0
    for batch in (orders[:8], orders[8:16], orders[16:]):
        async with trio.open_nursery() as nursery:
            for order in batch:
                nursery.start_soon(one, order)
    accounts = await coordinator.accounts()
    assert refused == 0
    assert sum(accounts.values()) == 0
    assert not [account for account in accounts if account.startswith("hold:")]
