from __future__ import annotations

import dataclasses

import pytest
import trio

from pinaivu_node.engine.prompt_size import count_tokens
from pinaivu_node.engine.synthetic import SyntheticEngine
from pinaivu_node.engine.types import (
    ChatMessage,
    Constraint,
    ConstraintKind,
    EmbeddingRequest,
    EngineBusy,
    FinishReason,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
    Tool,
    ToolUse,
)


def request(name="r", *, max_tokens=5, prompt="hello", resume=(), seed=0) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
    return GenerationRequest(name, prompt, sampling, resume_token_ids=resume)


async def answer(engine, wanted):
    async with engine.generate(wanted) as events:
        return [(event, trio.current_time()) async for event in events]


async def test_tokens_come_at_the_pace_that_was_asked_for(autojump_clock):
    engine = SyntheticEngine(tokens_per_second=10, ttft_ms=500)
    began = trio.current_time()
    events = await answer(engine, request())
    assert [round(at - began, 6) for _, at in events] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert [len(event.token_ids) for event, _ in events] == [1] * 5
    assert events[-1][0].finish_reason is FinishReason.LENGTH
    assert engine.statistics().tokens_per_second == pytest.approx(10)


async def test_all_requests_of_a_step_get_their_token_at_the_same_instant(autojump_clock):
    engine = SyntheticEngine(tokens_per_second=10, ttft_ms=0)
    times: list[set[float]] = []

    async def ask(delay: float) -> None:
        await trio.sleep(delay)
        times.append({at for _, at in await answer(engine, request(str(delay), max_tokens=20))})

    async with trio.open_nursery() as nursery:
        for delay in (0.01, 0.02, 0.03):
            nursery.start_soon(ask, delay)
    assert times[0] == times[1] == times[2]


async def test_beyond_its_capacity_it_queues_and_then_refuses(autojump_clock):
    engine = SyntheticEngine(tokens_per_second=10, ttft_ms=0, capacity=1, max_queued=1)
    async with engine.generate(request("a")) as first, engine.generate(request("b")) as second:
        await anext(first)
        statistics = engine.statistics()
        assert (statistics.running, statistics.queued) == (1, 1)
        assert statistics.ttft_estimate_ms >= 0
        with pytest.raises(EngineBusy):
            await answer(engine, request("c"))
        with trio.move_on_after(3) as waited:
            await anext(second)
        assert waited.cancelled_caught
    async with engine.generate(request("d")) as events:
        await anext(events)
    assert engine.statistics().running == 0


async def test_it_says_the_same_again_and_goes_on_from_what_it_said(autojump_clock):
    engine = SyntheticEngine()
    whole = [e.token_ids[0] for e, _ in await answer(engine, request(max_tokens=9, seed=4))]
    rest = [
        e.token_ids[0]
        for e, _ in await answer(engine, request(max_tokens=9, seed=4, resume=tuple(whole[:4])))
    ]
    assert whole[:4] + rest == whole
    assert whole != [e.token_ids[0] for e, _ in await answer(engine, request(max_tokens=9, seed=5))]


async def test_its_window_is_a_limit_like_any_models(autojump_clock):
    engine = SyntheticEngine(context_window=20)
    assert len(await answer(engine, request(prompt="x" * 60, max_tokens=100))) == 5
    with pytest.raises(PromptRefused, match="maximum context length is 20 tokens"):
        await answer(engine, request(prompt="x" * 80))


async def test_several_answers_differ_and_come_at_the_same_instants(autojump_clock):
    engine = SyntheticEngine(tokens_per_second=10, ttft_ms=500)
    wanted = dataclasses.replace(request(), sampling=SamplingParams(max_tokens=5, n=3))
    events = await answer(engine, wanted)
    texts, times = {}, {}
    for event, at in events:
        texts[event.index] = texts.get(event.index, "") + event.text
        times.setdefault(event.index, []).append(at)
    assert times[0] == times[1] == times[2]
    assert len(set(texts.values())) == 3
    assert [event.finish_reason for event, _ in events[-3:]] == [FinishReason.LENGTH] * 3
    # The first is what it would have been alone.
    assert texts[0] == "".join(event.text for event, _ in await answer(engine, request()))
    assert engine.statistics().tokens_per_second == pytest.approx(10)


@pytest.mark.parametrize(
    ("change", "sampling"),
    [
        ({"constraint": Constraint(ConstraintKind.JSON_OBJECT)}, {}),
        ({"tools": ToolUse((Tool("clock"),))}, {}),
        ({"resume_token_ids": (1,)}, {"n": 2}),
        ({}, {"logprobs": 0}),
        ({}, {"n": 0}),
        ({}, {"n": 129}),
    ],
)
async def test_what_nonsense_cannot_have_is_refused(autojump_clock, change, sampling):
    wanted = dataclasses.replace(
        request(), sampling=SamplingParams(max_tokens=5, **sampling), **change
    )
    with pytest.raises(PromptRefused):
        await answer(SyntheticEngine(), wanted)


async def test_it_makes_no_vectors(autojump_clock):
    with pytest.raises(PromptRefused, match="no embeddings"):
        await SyntheticEngine().embed(EmbeddingRequest("e", ("text",)))


def test_prompts_are_counted_by_their_bytes():
    assert count_tokens("") == 1
    assert count_tokens("x" * 9) == 3
    assert count_tokens((1, 2, 3)) == 3
    assert count_tokens((ChatMessage("user", "abcd"), ChatMessage("user", ""))) == 4 + 2 + 4 + 1
