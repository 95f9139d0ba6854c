"""Several answers, several prompts, logprobs and echoes, as OpenAI's client reads them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest
import trio
from counting_market import MODEL, Script
from http_client import Counter, open_counter

from pinaivu_gateway.jobs import StreamBroken

T = TypeVar("T")
USER: Any = [{"role": "user", "content": "Count!"}]
WHOLE = "One, two, three."


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with open_counter(tmp_path) as opened:
        yield opened


async def ask(counter: Counter, work: Callable[[openai.OpenAI], T]) -> T:
    def run() -> T:
        settings: Any = {"base_url": counter.url, "api_key": counter.key, "max_retries": 0}
        with contextlib.closing(openai.OpenAI(**settings)) as client:
            return work(client)

    return await trio.to_thread.run_sync(run)


async def test_several_answers_to_one_prompt(counter: Counter):
    def work(client: openai.OpenAI) -> tuple[Any, list[Any]]:
        chat = partial(client.chat.completions.create, model=MODEL, messages=USER, n=3)
        return chat(), list(chat(stream=True, stream_options={"include_usage": True}))

    whole, (*chunks, usage) = await ask(counter, work)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {choice.message.content for choice in whole.choices} == {WHOLE}
    assert {choice.finish_reason for choice in whole.choices} == {"stop"}
    texts = dict.fromkeys(range(3), "")
    finishes = []
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finishes += [choice.index] if choice.finish_reason else []
    assert texts == dict.fromkeys(range(3), WHOLE)
    assert finishes == [0, 1, 2]
    assert usage.usage.total_tokens == whole.usage.total_tokens
    assert [bought.order.sampling.n for bought in counter.market.bought] == [3, 3]


async def test_each_prompt_has_its_choices_and_its_request_id(counter: Counter):
    def work(client: openai.OpenAI) -> tuple[Any, list[Any]]:
        raw = partial(client.completions.create, model=MODEL, prompt=["a", "b"], n=2, echo=True)
        return raw(), list(raw(stream=True, stream_options={"include_usage": True}))

    whole, (*chunks, usage) = await ask(counter, work)
    prompts = ["a", "a", "b", "b"]
    assert [choice.text for choice in whole.choices] == [prompt + WHOLE for prompt in prompts]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [prompt + WHOLE for prompt in prompts]
    assert whole.usage.total_tokens == usage.usage.total_tokens == 2 * 13
    request_ids = whole.model_extra["request_ids"]
    assert len(set(request_ids)) == 2
    assert request_ids[0] == whole.model_extra["request_id"]
    assert {bought.order.request_id for bought in counter.market.bought[:2]} == set(request_ids)


async def test_a_prompt_that_fails_ends_the_others(counter: Counter):
    counter.market.script = Script(breaks=StreamBroken("gone"))

    def work(client: openai.OpenAI) -> None:
        stream = client.completions.create(model=MODEL, prompt=["a", "b"], stream=True)
        for _ in stream:
            pass

    with pytest.raises(openai.APIError, match="gone"):
        await ask(counter, work)
    with trio.fail_after(5):
        for bought in counter.market.bought:
            await bought.over.wait()
    assert "failed" in {bought.ending for bought in counter.market.bought}


async def test_logprobs_of_raw_completions(counter: Counter):
    def work(client: openai.OpenAI) -> tuple[Any, list[Any]]:
        raw = partial(client.completions.create, model=MODEL, prompt="x", logprobs=1)
        return raw(), list(raw(stream=True))

    whole, chunks = await ask(counter, work)
    said = whole.choices[0].logprobs
    assert said.tokens == ["One", ", two", ", three", "."]
    assert said.token_logprobs == [-0.5] * 4
    assert said.top_logprobs[1] == {", two": -0.5}
    assert said.text_offset == [0, 3, 8, 15]
    offsets = [
        offset
        for chunk in chunks
        if chunk.choices[0].logprobs
        for offset in chunk.choices[0].logprobs.text_offset
    ]
    assert offsets == said.text_offset
