"""Warm prompts and what rides beside text, through the whole network, under virtual time."""

from __future__ import annotations

import trio
from town import CREDIT, Town, failed_checks, peer_of, settled, spoken, until
from warm_engine import WarmEngine

from pinaivu_gateway.fingerprints import fingerprint_chain
from pinaivu_gateway.jobs import JobFinished, TextDelta
from pinaivu_node.coordinator.auction import open_bid_set_untrusted
from pinaivu_node.engine.types import ToolCallDelta
from pinaivu_node.protocol import inference
from pinaivu_node.protocol.answer import digest_of_answer
from pinaivu_node.protocol.inference import ChatTurn, Finish, Prompt, Sampling
from pinaivu_node.protocol.market import Preference
from pinaivu_node.protocol.money import cost
from pinaivu_node.protocol.receipt import Receipt
from pinaivu_node.protocol.signing import open_untrusted

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
LONG = "The sea is wide, and it was there before us. " * 40


def chat(town: Town, *contents: str, key: bytes = KEY, **changes):
    """The order for a chat of these turns, as the HTTP side would place it for this key."""
    roles = ("user", "assistant")
    turns = tuple(
        ChatTurn(role=roles[number % 2], content=content) for number, content in enumerate(contents)
    )
    size = sum(map(len, contents))
    fields = {
        "prompt": Prompt(nonce=bytes(16), turns=turns),
        "input_limit": size + 200,
        "input_estimate": size,
        "fingerprints": fingerprint_chain(key, turns),
        "tenant": key,
    }
    return town.order(**{**fields, **changes})


async def opened(town: Town, **engines: WarmEngine):
    """A coordinator, a gateway, and a provider for each engine, each dearer than the one before."""
    await town.coordinator()
    for number, (name, engine) in enumerate(engines.items()):
        price = 200_000_000 + 1_000_000 * number
        await town.provider(name, engine=engine, output_price=price)
    market = await town.gateway()
    await until(lambda: len(market.providers()) == len(engines))
    await until(lambda: all(each.connected for each in market.providers()))
    return market


async def bought(market, order) -> tuple[str, JobFinished, float, str]:
    """Text, end, time to first token, and who said it."""
    started = trio.current_time()
    async with market.buy(order) as job:
        waited = trio.current_time() - started
        provider = job.provider
        text, finished = await spoken(job)
    return text, finished, waited, provider


async def receipt_of(market, order) -> Receipt:
    reply = await settled(market, order)
    return open_untrusted(reply.receipt, Receipt, signer=peer_of("coordinator"))


async def test_the_next_turn_of_a_chat_is_warm_cheaper_and_sooner(
    town: Town, autojump_clock
) -> None:
    engine = WarmEngine()
    market = await opened(town, a=engine)
    first = chat(town, LONG)
    text, finished, cold_wait, _ = await bought(market, first)
    assert finished.usage.cached_input == 0
    second = chat(town, LONG, text, "And the mountains?")
    _, finished, warm_wait, _ = await bought(market, second)
    prompt = finished.usage.prompt
    assert prompt > 1800
    assert finished.usage.cached_input > 0.9 * len(LONG)
    assert warm_wait < 0.2 * cold_wait
    receipt = await receipt_of(market, second)
    [segment] = receipt.segments
    assert segment.usage == finished.usage
    assert await failed_checks(market, second) == []
    all_cold = finished.usage.model_copy(update={"input": prompt, "cached_input": 0})
    assert receipt.amount < cost(all_cold, segment.prices, uplift_ppm=segment.uplift_ppm)


async def test_the_provider_that_was_told_the_beginning_wins_the_next_turn(
    town: Town, autojump_clock
) -> None:
    """Though the other asks less and has as good a record."""
    market = await opened(town, cheap=WarmEngine(), dear=WarmEngine())
    only_cheap, only_dear = {"allow": (peer_of("cheap"),)}, {"allow": (peer_of("dear"),)}
    for number in range(2):
        await bought(market, chat(town, f"{number} {LONG}", **only_cheap))
    text, *_ = await bought(market, chat(town, LONG, **only_dear))
    turns = (LONG, text, "And then?")
    *_, provider = await bought(market, chat(town, *turns, preference=Preference.PRICE))
    assert provider == peer_of("dear")
    stranger = chat(town, *turns, key=OTHER_KEY, preference=Preference.PRICE)
    *_, provider = await bought(market, stranger)
    assert provider == peer_of("cheap")


async def test_two_keys_share_nothing_however_alike_they_speak(town: Town, autojump_clock) -> None:
    engine = WarmEngine()
    market = await opened(town, a=engine)
    await bought(market, chat(town, LONG))
    _, finished, wait, _ = await bought(market, chat(town, LONG, key=OTHER_KEY))
    assert finished.usage.cached_input == 0
    assert wait > 0.8
    assert [request.tenant for request in engine.asked] == [KEY, OTHER_KEY]


async def test_a_claim_that_was_not_honoured_costs_the_provider_and_not_the_client(
    town: Town, autojump_clock
) -> None:
    engine = WarmEngine()
    market = await opened(town, a=engine)
    text, *_ = await bought(market, chat(town, LONG))
    engine.forget()  # and says nothing about it
    order = chat(town, LONG, text, "And then?")
    _, finished, _, _ = await bought(market, order)
    assert finished.usage.cached_input == 0  # the engine's own count
    receipt = await receipt_of(market, order)
    [segment] = receipt.segments
    assert segment.usage.cached_input > 0.9 * len(LONG)  # as the bid said
    assert segment.usage.prompt == finished.usage.prompt
    assert receipt.amount == cost(segment.usage, segment.prices, uplift_ppm=segment.uplift_ppm)
    honest = cost(finished.usage, segment.prices, uplift_ppm=segment.uplift_ppm)
    assert receipt.amount < 0.5 * honest
    assert await failed_checks(market, order) == []


async def test_who_says_warm_what_is_cold_is_taken_for_slower(town: Town, autojump_clock) -> None:
    """Its one wait counts as several, since the claim was to save nearly all of it."""
    engine = WarmEngine()
    market = await opened(town, a=engine)
    text, _, wait, _ = await bought(market, chat(town, LONG))
    engine.forget()
    order = chat(town, LONG, text, "And then?")
    before = await measured_ttft(market, order)
    await receipt_of(market, order)
    after = await measured_ttft(market, chat(town, "Hello!"))
    assert before < 1000 * wait
    assert after > 1000 * wait  # which no wait was, and the prior is shorter


async def measured_ttft(market, order) -> int:
    """Buy this, and see what the auction went by."""
    await bought(market, order)
    await settled(market, order)
    leaves = await market.bid_set(order.request_id)
    _, [answer] = open_bid_set_untrusted(leaves)
    return answer.measurement.ttft_ms


async def test_a_restarted_engine_claims_nothing(town: Town, autojump_clock) -> None:
    engine = WarmEngine()
    market = await opened(town, a=engine)
    text, *_ = await bought(market, chat(town, LONG))
    engine.restart()
    order = chat(town, LONG, text, "And then?")
    await bought(market, order)
    [segment] = (await receipt_of(market, order)).segments
    assert segment.usage.cached_input == 0


async def test_what_is_warm_shows_in_the_providers_statistics(town: Town, autojump_clock) -> None:
    await town.coordinator()
    provider = await town.provider("a", engine=WarmEngine())
    market = await town.gateway()
    await until(lambda: len(market.providers()) == 1)
    text, *_ = await bought(market, chat(town, LONG))
    await bought(market, chat(town, LONG, text, "And then?"))
    [model] = provider.statistics().models
    assert model.warm_prefixes == 3  # both prompts, and the answer between them
    assert 0.4 < model.cached_tokens / model.input_tokens < 0.6
    assert 0 < model.kv_blocks_free < model.kv_blocks


async def test_logprobs_reach_the_gateway_one_for_each_token(town: Town, autojump_clock) -> None:
    market = await opened(town, a=WarmEngine())
    order = town.order(sampling=Sampling(max_tokens=20, logprobs=3))
    ids: list[int] = []
    logprobs: list[inference.TokenLogprob] = []
    async with market.buy(order) as job:
        async for event in job.events():
            if isinstance(event, TextDelta):
                ids += event.token_ids
                logprobs += event.logprobs
    assert len(ids) == 20
    assert [each.chosen for each in logprobs] == [(number, b"x", -0.5) for number in ids]
    assert all(len(each.top) == 3 for each in logprobs)
    assert await failed_checks(market, order) == []


async def test_tool_calls_are_asked_for_delivered_and_signed(town: Town, autojump_clock) -> None:
    engine = WarmEngine()
    engine.calls = (
        ToolCallDelta(0, "call_1", "weather", '{"in": '),
        ToolCallDelta(0, arguments='"Bern"}'),
    )
    market = await opened(town, a=engine)
    tools = inference.ToolUse(
        tools=(inference.Tool(name="weather"),), choice=inference.ToolChoice.REQUIRED
    )
    constraint = inference.Constraint(kind=inference.ConstraintKind.REGEX, text="a+")
    turns = (ChatTurn(role="user", content="What is the weather in Bern?"),)
    order = town.order(
        prompt=Prompt(nonce=bytes(16), turns=turns, tools=tools),
        sampling=Sampling(max_tokens=20, constraint=constraint, stop_token_ids=(3,)),
    )
    text, calls = "", []
    async with market.buy(order) as job:
        async for event in job.events():
            match event:
                case TextDelta():
                    text += event.text
                    calls += event.tool_calls
                case JobFinished(finish=finish):
                    assert finish is Finish.TOOL_CALLS
    assert "".join(call.arguments for call in calls) == '{"in": "Bern"}'
    assert (calls[0].id, calls[0].name) == ("call_1", "weather")
    [request] = engine.asked
    assert request.tools is not None
    assert request.tools.tools[0].name == "weather"
    assert request.constraint is not None
    assert request.sampling.stop_token_ids == (3,)
    call = inference.ToolCall(id="call_1", name="weather", arguments='{"in": "Bern"}')
    receipt = await receipt_of(market, order)
    assert receipt.output_hash == digest_of_answer(text, [call])
    assert await failed_checks(market, order) == []
    assert CREDIT > receipt.amount > 0
