"""OpenAI's own client against the gateway."""

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

from pinaivu_gateway import jobs

T = TypeVar("T")
USER: Any = [{"role": "user", "content": "Count!"}]


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with open_counter(tmp_path) as opened:
        yield opened


async def ask(counter: Counter, work: Callable[[openai.OpenAI], T], **changes: Any) -> T:
    """Do `work` with a client, in a thread as it blocks."""

    def run() -> T:
        settings = {"base_url": counter.url, "api_key": counter.key, "max_retries": 0}
        with contextlib.closing(openai.OpenAI(**{**settings, **changes})) as client:
            return work(client)

    return await trio.to_thread.run_sync(run)


async def test_a_chat(counter: Counter):
    answer = await ask(
        counter, lambda client: client.chat.completions.create(model=MODEL, messages=USER)
    )
    assert answer.choices[0].message.content == "One, two, three."
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer._request_id == answer.model_extra["request_id"]  # type: ignore[index]


async def test_a_streamed_chat(counter: Counter):
    def work(client: openai.OpenAI) -> list[Any]:
        stream = client.chat.completions.create(
            model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
        )
        return list(stream)

    *chunks, usage = await ask(counter, work)
    texts = [each.choices[0].delta.content or "" for each in chunks]
    assert "".join(texts) == "One, two, three."
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert usage.usage.total_tokens == 13
    assert len({each.model_extra["request_id"] for each in [*chunks, usage]}) == 1


async def test_the_stream_helper(counter: Counter):
    def work(client: openai.OpenAI) -> Any:
        with client.chat.completions.stream(model=MODEL, messages=USER) as stream:
            for _ in stream:
                pass
            return stream.get_final_completion()

    final = await ask(counter, work)
    assert final.choices[0].message.content == "One, two, three."


async def test_a_completion_streamed_and_not(counter: Counter):
    def work(client: openai.OpenAI) -> tuple[str, str]:
        whole = client.completions.create(model=MODEL, prompt="Count:")
        stream = client.completions.create(model=MODEL, prompt="Count:", stream=True)
        return whole.choices[0].text, "".join(each.choices[0].text for each in stream)

    assert await ask(counter, work) == ("One, two, three.",) * 2


async def test_models_are_listed_and_retrieved(counter: Counter):
    def work(client: openai.OpenAI) -> tuple[list[str], str]:
        return [each.id for each in client.models.list()], client.models.retrieve(MODEL).id

    assert await ask(counter, work) == ([MODEL], MODEL)


def create(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": USER, **fields})


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "model_not_found"),
        ({"model": "org/name"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, "integer_above_max_value"),
        ({"n": 129}, openai.BadRequestError, "integer_above_max_value"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "missing_required_parameter"),
    ],
)
async def test_refusals_are_the_clients_own_exceptions(counter: Counter, fields, error, code):
    if fields.get("model") == "gpt-4o":
        counter.market.script = Script(refusal=jobs.UnknownModel("nobody serves it"))
    with pytest.raises(error) as caught:
        await ask(counter, partial(create, **fields))
    assert caught.value.code == code


async def test_a_wrong_key(counter: Counter):
    with pytest.raises(openai.AuthenticationError):
        await ask(counter, create, api_key="sk-pnv-wrong")


async def test_no_bids_is_asked_again_and_then_answered(counter: Counter):
    counter.market.script = Script(refusal=jobs.NoBids("nobody is free", retry_after_ms=1))

    async with trio.open_nursery() as nursery:

        async def relent() -> None:
            await counter.market.new_job.wait()
            await counter.market.bought[0].over.wait()
            counter.market.script = Script()

        nursery.start_soon(relent)
        answer = await ask(counter, create, max_retries=2)
    assert answer.choices[0].message.content == "One, two, three."
    assert len(counter.market.bought) == 2


async def test_no_credit_is_not_asked_again(counter: Counter):
    counter.market.script = Script(refusal=jobs.NoCredit("the account is empty"))
    with pytest.raises(openai.APIStatusError) as caught:
        await ask(counter, create, max_retries=2)
    assert caught.value.status_code == 402
    assert caught.value.code == "insufficient_quota"
    assert len(counter.market.bought) == 1


async def test_a_stream_that_breaks_raises(counter: Counter):
    counter.market.script = Script(breaks=jobs.StreamBroken("the provider was lost"))
    with pytest.raises(openai.APIError, match="the provider was lost"):
        await ask(counter, lambda client: list(create(client, stream=True)))


async def test_preferences_go_into_the_extra_body(counter: Counter):
    await ask(
        counter,
        partial(
            create,
            extra_body={"provider": {"sort": "price", "max_price": {"prompt": 1, "completion": 2}}},
        ),
    )
    ceiling = counter.market.bought[0].order.max_prices
    assert ceiling is not None
    assert (ceiling.input, ceiling.output) == (10**9, 2 * 10**9)
