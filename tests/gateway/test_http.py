"""The HTTP surface over real sockets, on a market that counts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import trio
from counting_market import MODEL, Script
from http_client import CHAT, Counter, events_of, open_counter

from pinaivu_gateway import jobs
from pinaivu_node.protocol.inference import Finish


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with open_counter(tmp_path) as opened:
        yield opened


async def test_a_chat_is_answered_whole(counter: Counter):
    answer = await counter.chat()
    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "One, two, three.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"]["prompt_tokens"] == 9
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert body["usage"]["total_tokens"] == 13
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["id"] == "chatcmpl-" + body["request_id"].removeprefix("req_")


async def test_a_stream_tells_the_same_as_the_whole(counter: Counter):
    answer = await counter.chat(stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events_of(answer.content)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert done == "[DONE]"
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks) == (
        "One, two, three."
    )
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 13
    assert {each["request_id"] for each in chunks} == {answer.headers["x-request-id"]}


async def test_a_stream_whose_usage_was_not_asked_for_has_choices_in_every_chunk(counter: Counter):
    answer = await counter.chat(stream=True)
    *chunks, done = events_of(answer.content)
    assert done == "[DONE]"
    assert all(each["choices"] and "usage" not in each for each in chunks)


async def test_a_raw_completion_is_answered_both_ways(counter: Counter):
    async with counter.client() as client:
        request = {"model": MODEL, "prompt": "Count:"}
        whole = (await client.post("/v1/completions", json=request)).json()
        request["stream"] = True
        streamed = events_of((await client.post("/v1/completions", json=request)).content)
    assert whole["object"] == "text_completion"
    assert whole["id"].startswith("cmpl-")
    assert whole["choices"][0]["text"] == "One, two, three."
    assert "".join(each["choices"][0]["text"] for each in streamed[:-1]) == "One, two, three."
    assert counter.market.bought[0].order.output_limit == 16
    assert counter.market.bought[0].order.prompt.text == "Count:"


ERRORS = [
    (jobs.UnknownModel("no"), 404, "model_not_found", None),
    (jobs.NoBids("nobody is free"), 503, "no_bids", "1"),
    (jobs.NoBids("nobody", retry_after_ms=3100), 503, "no_bids", "4"),
    (jobs.NobodyEligible("all too dear"), 400, "no_provider_matches", None),
    (jobs.NoCredit("the account is empty"), 402, "insufficient_quota", None),
    (jobs.Overloaded("busy"), 503, "server_is_overloaded", "2"),
    (jobs.Overloaded("busy", retry_after_ms=10**9), 503, "server_is_overloaded", "120"),
    (jobs.JobInvalid("bad terms"), 400, "invalid_value", None),
    (jobs.CoordinatorUnreachable("away"), 502, "coordinator_unreachable", "2"),
    (jobs.ProvidersFailed("three died"), 502, "providers_failed", "1"),
    (jobs.PromptTooLong("9000 tokens"), 400, "context_length_exceeded", None),
    (jobs.PromptNotAccepted("no template"), 400, "prompt_not_accepted", None),
    (jobs.DeadlinePassed("late"), 504, "timeout", None),
    (jobs.StreamBroken("lost"), 502, "provider_lost", None),
    (jobs.JobError("else"), 502, "upstream_error", None),
]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("error", "status", "code", "retry"), ERRORS, ids=lambda each: type(each).__name__
)
async def test_what_fails_before_the_first_token_is_plain_json(
    counter: Counter, error, status, code, retry, streamed
):
    counter.market.script = Script(refusal=error)
    answer = await counter.chat(stream=streamed)
    fault = answer.json()["error"]
    assert (answer.status_code, fault["code"]) == (status, code)
    assert answer.headers.get("retry-after") == retry
    assert set(fault) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")


async def test_no_credit_is_explained_and_not_retried(counter: Counter):
    counter.market.script = Script(refusal=jobs.NoCredit("the account is empty"))
    answer = await counter.chat()
    assert answer.headers["x-should-retry"] == "false"
    assert "deposit credit" in answer.json()["error"]["message"]


async def test_the_context_error_is_worded_as_routers_know_it(counter: Counter):
    counter.market.script = Script(refusal=jobs.PromptTooLong("9000 tokens"))
    fault = (await counter.chat()).json()["error"]
    assert fault["message"].startswith("This model's maximum context length is 8192 tokens.")
    assert fault["message"].endswith("(context_length_exceeded)")
    assert fault["param"] == "messages"


async def test_a_broken_stream_ends_with_an_error_and_nothing_else(counter: Counter):
    counter.market.script = Script(breaks=jobs.StreamBroken("the provider was lost"))
    answer = await counter.chat(stream=True)
    *chunks, last = events_of(answer.content)
    assert answer.status_code == 200
    assert last["error"]["message"] == "the provider was lost"
    assert last["error"]["code"] == "provider_lost"
    assert all(each["choices"][0]["finish_reason"] is None for each in chunks)


@pytest.mark.parametrize("finish", [Finish.ERROR, Finish.CANCELLED])
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_end_that_is_none_is_an_error(counter: Counter, finish, streamed):
    counter.market.script = Script(finish=finish)
    answer = await counter.chat(stream=streamed)
    if streamed:
        assert "error" in events_of(answer.content)[-1]
    else:
        assert answer.status_code == 502


async def test_a_silent_stream_is_kept_alive_with_comments(tmp_path: Path):
    async with open_counter(tmp_path, ping_interval=0.05) as counter:
        counter.market.script = Script(texts=("a", "b"), pause=0.2)
        answer = await counter.chat(stream=True)
    assert answer.content.count(b": ping\n\n") >= 2
    assert answer.content.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("phase", ["before", "after"])
async def test_a_client_that_leaves_cancels_its_job(counter: Counter, streamed, phase):
    counter.market.script = Script(
        texts=("a",) * 1000, pause=0.05, silence=30 if phase == "before" else 0
    )
    async with await counter.ask_raw({**CHAT, "stream": streamed}) as stream:
        await counter.market.new_job.wait()
        if phase == "after" and streamed:
            await stream.receive_some(100)
    with trio.fail_after(1):
        await counter.market.bought[0].over.wait()
    assert counter.market.bought[0].ending == "cancelled"


async def test_a_client_that_reads_nothing_is_dropped(tmp_path: Path):
    async with open_counter(tmp_path, stall_limit=0.3) as counter:
        counter.market.script = Script(texts=("x" * 60_000,) * 10_000)
        async with await counter.ask_raw({**CHAT, "stream": True}):
            await counter.market.new_job.wait()
            with trio.fail_after(5):
                await counter.market.bought[0].over.wait()
        assert counter.market.bought[0].ending == "cancelled"


async def test_a_connection_serves_one_request_after_the_other(counter: Counter):
    async with counter.client(limits=httpx.Limits(max_connections=1)) as client:
        for streamed in (True, False, True):
            answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": streamed})
            assert answer.status_code == 200
            assert "connection" not in answer.headers


async def test_a_stop_lets_a_stream_finish_and_takes_no_new_request(tmp_path: Path):
    async with open_counter(tmp_path) as counter:
        counter.market.script = Script(texts=("a",) * 10, pause=0.05)
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await counter.chat(stream=True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await counter.market.new_job.wait()
            counter.stop.set()
        assert answers[0].content.endswith(b"data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError):
            await counter.chat()


async def test_more_jobs_than_allowed_are_told_to_come_back(tmp_path: Path):
    async with open_counter(tmp_path, max_requests=1) as counter:
        counter.market.script = Script(silence=30)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(counter.chat)
            await counter.market.new_job.wait()
            answer = await counter.chat()
            nursery.cancel_scope.cancel()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


async def test_usage_is_kept_when_the_gateway_stops(tmp_path: Path):
    async with open_counter(tmp_path) as counter:
        await counter.chat()
        counter.stop.set()
        await counter.stopped.wait()
        (row,) = await counter.store.usage()
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (9, 2, 4)
    assert (row.finish, row.key_prefix) == ("stop", counter.key[:15])
