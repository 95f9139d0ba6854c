"""The gateway's market, told as stories against actors on the memory mesh."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from market_place import (
    AHEAD,
    Place,
    buy,
    clock,
    open_place,
    spoken,
    until,
)
from provider_actor import Job, answer_well, peer_of, signer_of, stop_when_cancelled
from trio.testing import MockClock

from pinaivu_gateway import jobs
from pinaivu_gateway.jobs import TextDelta
from pinaivu_node.protocol.ids import digest_of
from pinaivu_node.protocol.inference import Finish, RefuseReason
from pinaivu_node.protocol.market import Outcome, SegmentOutcome
from pinaivu_node.protocol.money import TokenUsage


@pytest.fixture
async def place(autojump_clock: MockClock) -> AsyncIterator[Place]:
    async with open_place() as opened:
        yield opened


async def listen(market: jobs.Market, order: jobs.JobOrder, heard: list[str]) -> None:
    async with market.buy(order) as job:
        async for event in job.events():
            assert isinstance(event, TextDelta)
            heard.append(event.text)


async def test_a_job_is_bought_and_signed_for_as_it_was_proven(place: Place, autojump_clock):
    await place.provider("a")
    market = await place.market()
    order = place.order()
    async with market.buy(order) as job:
        assert job.provider == peer_of("a")
        text, finished = await spoken(job)
    assert text == "The sea is wide."
    usage = TokenUsage(input=11, cached_input=2, output=4)
    assert (finished.finish, finished.usage) == (Finish.STOP, usage)
    assert finished.cost > 0
    delivery = await place.delivery(order)
    assert delivery.outcome is Outcome.COMPLETED
    assert delivery.output_hash == digest_of(text.encode())
    (segment,) = delivery.segments
    assert (segment.outcome, segment.usage) == (SegmentOutcome.COMPLETED, finished.usage)
    assert segment.ttft_ms is not None
    await until(lambda: not place.outbox.kept)


async def test_deadlines_are_written_on_the_coordinators_clock(place: Place, autojump_clock):
    await place.provider("a")
    market = await place.market()
    await buy(place, market, deadline_in=30_000)
    deadline = place.coordinator.requests[0].terms.deadline
    assert abs(deadline - (clock() + AHEAD + 30_000)) < 1000


# --- failover -------------------------------------------------------------------------------------


async def refuse(job: Job) -> None:
    await job.refuse(RefuseReason.FULL)


async def say_nothing(job: Job) -> None:
    await trio.sleep_forever()


async def accept_and_hang(job: Job) -> None:
    await job.accept()
    await trio.sleep_forever()


async def fail_at_once(job: Job) -> None:
    await job.accept()
    await job.done(Finish.ERROR, outcome=SegmentOutcome.ERROR)


async def leave(job: Job) -> None:
    job.stream.reset()


async def leave_a_gap(job: Job) -> None:
    await job.accept()
    await job.tokens("x", position=3)


async def speak_before_accepting(job: Job) -> None:
    await job.tokens("x")


async def say_too_much(job: Job) -> None:
    await job.accept()
    await job.tokens(*["x"] * 21)


async def drown_in_text(job: Job) -> None:
    await job.accept()
    await job.tokens("x" * 5000)


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (refuse, SegmentOutcome.REFUSED),
        (say_nothing, SegmentOutcome.STALLED),
        (accept_and_hang, SegmentOutcome.STALLED),
        (fail_at_once, SegmentOutcome.ERROR),
        (leave, SegmentOutcome.DIED),
        (leave_a_gap, SegmentOutcome.ERROR),
        (speak_before_accepting, SegmentOutcome.ERROR),
        (say_too_much, SegmentOutcome.ERROR),
        (drown_in_text, SegmentOutcome.ERROR),
    ],
)
async def test_a_winner_that_fails_before_its_first_token_is_replaced(
    place: Place, autojump_clock, script, outcome: SegmentOutcome
):
    await place.provider("bad", script)
    standby = await place.provider("good")
    market = await place.market()
    order = place.order()
    async with market.buy(order) as job:
        assert job.provider == peer_of("good")
        assert job.failovers == 1
        text, _ = await spoken(job)
    assert text == "The sea is wide."
    # The whole prompt, not a rest of it.
    assert standby.jobs[order.request_id].dispatch.prompt == order.prompt
    delivery = await place.delivery(order)
    assert [each.outcome for each in delivery.segments] == [outcome, SegmentOutcome.COMPLETED]
    assert delivery.segments[0].usage.output == 0
    assert delivery.output_hash == digest_of(text.encode())


async def test_a_winner_that_dies_while_it_thinks_is_replaced(place: Place, autojump_clock):
    await place.provider("bad", accept_and_hang)
    await place.provider("good")
    market = await place.market()
    started = trio.current_time()

    async def kill_soon() -> None:
        await trio.sleep(1)
        place.kill("bad")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill_soon)
        assert (await buy(place, market))[0] == "The sea is wide."
    assert trio.current_time() - started < 2


async def test_a_winner_that_was_never_seen_is_dialled_and_given_up(place: Place, autojump_clock):
    await place.provider("bad")
    await place.provider("good")
    market = await place.market()
    place.kill("bad")
    assert (await buy(place, market))[0] == "The sea is wide."


async def test_when_all_fail_the_client_is_told_and_nothing_is_billed(place: Place, autojump_clock):
    for name in ("a", "b", "c"):
        await place.provider(name, refuse)
    market = await place.market()
    order = place.order()
    with pytest.raises(jobs.ProvidersFailed, match="full"):
        async with market.buy(order):
            pass
    delivery = await place.delivery(order)
    assert delivery.outcome is Outcome.FAILED
    assert len(delivery.segments) == 3
    assert {each.usage.output for each in delivery.segments} == {0}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("This model's maximum context length is 8192 tokens. However …", jobs.PromptTooLong),
        ("This model has no chat template.", jobs.PromptNotAccepted),
    ],
)
async def test_a_prompt_that_no_engine_would_take_is_not_tried_elsewhere(
    place: Place, autojump_clock, words: str, error: type[Exception]
):
    async def refuse_prompt(job: Job) -> None:
        await job.refuse(RefuseReason.PROMPT_REFUSED, words)

    await place.provider("a", refuse_prompt)
    other = await place.provider("b")
    market = await place.market()
    with pytest.raises(error, match="This model"):
        await buy(place, market)
    assert not other.jobs


async def test_an_answer_that_breaks_off_ends_with_an_error_and_is_paid_so_far(
    place: Place, autojump_clock
):
    async def break_off(job: Job) -> None:
        await job.accept()
        await job.tokens("The ", "sea")
        await trio.sleep(0.5)
        job.stream.reset()

    await place.provider("a", break_off)
    other = await place.provider("b")
    market = await place.market()
    order = place.order()
    heard: list[str] = []
    with pytest.raises(jobs.StreamBroken, match="lost"):
        await listen(market, order, heard)
    assert "".join(heard) == "The sea"
    assert not other.jobs
    delivery = await place.delivery(order)
    assert delivery.outcome is Outcome.FAILED
    assert delivery.segments[0].usage.output == 2
    assert delivery.segments[0].outcome is SegmentOutcome.DIED


async def test_a_provider_that_falls_silent_in_mid_answer_is_given_up(place: Place, autojump_clock):
    async def fall_silent(job: Job) -> None:
        await job.accept()
        await job.tokens("The ")
        await trio.sleep_forever()

    provider = await place.provider("a", fall_silent)
    market = await place.market(stall_timeout=3.0)
    with pytest.raises(jobs.StreamBroken):
        await buy(place, market)
    await until(lambda: provider.cancelled_at is not None, within=0.1)


async def test_the_time_that_the_client_gave_is_kept(place: Place, autojump_clock):
    await place.provider("a", accept_and_hang)
    market = await place.market()
    started = trio.current_time()
    with pytest.raises(jobs.DeadlinePassed):
        await buy(place, market, deadline_in=2000)
    assert trio.current_time() - started < 2.1


# --- what is proven -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        {"usage": TokenUsage(input=11, cached_input=0, output=5)},
        {"usage": TokenUsage(input=201, cached_input=0, output=4)},
        {"output_hash": digest_of(b"another text")},
        {"model_digest": digest_of(b"other weights")},
        {"token": digest_of(b"another token")},
        {"gateway": peer_of("stranger")},
        {"signer": signer_of("stranger")},
    ],
    ids=["output", "input", "text", "model", "token", "gateway", "signer"],
)
async def test_a_proof_that_does_not_fit_breaks_the_answer_and_the_provider_off(
    place: Place, autojump_clock, lie: dict
):
    async def cheat(job: Job) -> None:
        await job.accept()
        await job.tokens("The ", "sea ", "is ", "wide.")
        await job.done(**lie)

    await place.provider("cheat", cheat)
    market = await place.market()
    order = place.order()
    with pytest.raises(jobs.StreamBroken):
        async with market.buy(order) as job:
            await spoken(job)
    delivery = await place.delivery(order)
    assert delivery.segments[0].outcome is SegmentOutcome.ERROR
    assert delivery.segments[0].usage.output == 4
    await until(lambda: peer_of("cheat") not in place.gateway_mesh.peers())


async def test_vouchers_own_up_to_what_came_every_128_tokens(place: Place, autojump_clock):
    async def speak_long(job: Job) -> None:
        await job.accept()
        for _ in range(100):
            await job.tokens("a", "b", "c")
        await job.done(Finish.LENGTH)

    provider = await place.provider("a", speak_long)
    market = await place.market()
    await buy(place, market, max_tokens=300)
    await until(lambda: len(provider.vouchers) == 2)
    assert [each.output_tokens for each in provider.vouchers] == [129, 258]


# --- leaving --------------------------------------------------------------------------------------


async def test_a_client_that_leaves_cancels_within_a_second_and_pays_what_it_got(
    place: Place, autojump_clock
):
    provider = await place.provider("a", stop_when_cancelled)
    market = await place.market()
    order = place.order(max_tokens=1000)
    async with market.buy(order) as job:
        assert job.provider == peer_of("a")
        await trio.sleep(0.5)
        left_at = trio.current_time()
    assert trio.current_time() == left_at  # leaving does not wait for the provider
    delivery = await place.delivery(order)
    assert provider.cancelled_at is not None
    assert provider.cancelled_at - left_at < 0.1
    assert delivery.outcome is Outcome.CANCELLED
    (segment,) = delivery.segments
    # Both sides count the same, to the token and to the byte.
    assert segment.usage.output == provider.jobs[order.request_id].position
    assert segment.outcome is SegmentOutcome.CANCELLED
    assert segment.usage.input == 11


async def test_a_client_that_leaves_before_the_first_token_cancels_too(
    place: Place, autojump_clock
):
    provider = await place.provider("a", accept_and_hang)
    market = await place.market()
    order = place.order()
    with trio.move_on_after(1):
        async with market.buy(order):
            pass
    delivery = await place.delivery(order)
    assert provider.cancelled_at is not None
    assert delivery.outcome is Outcome.CANCELLED
    assert delivery.segments[0].usage.output == 0


async def test_an_award_that_comes_after_the_client_has_left_is_handed_back(
    place: Place, autojump_clock
):
    provider = await place.provider("a")
    market = await place.market()
    place.coordinator.award_delay = 1.0
    order = place.order()
    with trio.move_on_after(0.5):
        async with market.buy(order):
            pass
    delivery = await place.delivery(order)
    assert delivery.outcome is Outcome.CANCELLED
    assert delivery.segments == ()
    assert not provider.jobs


async def test_a_client_that_does_not_read_holds_up_nobody(place: Place, autojump_clock):
    """The reader of the stream fills its bound; the neighbour's answer comes as if alone."""

    async def flood_the_first(job: Job) -> None:
        if job.dispatch.sampling.max_tokens < 1000:
            await answer_well(job)
            return
        await job.accept()
        while not job.cancelled.is_set():
            await job.tokens(*["y" * 1000] * 60)
        await job.done(Finish.CANCELLED)

    await place.provider("a", flood_the_first)
    market = await place.market()
    async with market.buy(place.order(max_tokens=100_000)) as slow:
        assert (await buy(place, market))[0] == "The sea is wide."
        await trio.sleep(5)
        with pytest.raises(jobs.StreamBroken, match="does not read"):
            await spoken(slow)
