"""The engine over HTTP, against a real server that speaks the API: Hypercorn, on a real socket."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from pinaivu_node.engine.config import OpenAIEngineConfig
from pinaivu_node.engine.openai.engine import open_openai_engine
from pinaivu_node.engine.synthetic import SyntheticEngine
from pinaivu_node.engine.types import (
    ChatMessage,
    EmbeddingRequest,
    EngineBusy,
    EngineDead,
    EngineError,
    FinishReason,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
    Tool,
    ToolUse,
)

# httpx leaves its nested generators to the collector when a response is closed half-read.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")


HELLO = (ChatMessage("user", "hello"),)


class Server:
    """An OpenAI-compatible server over an engine of ours."""

    def __init__(self, *, counts_as_it_goes: bool) -> None:
        self.engine = SyntheticEngine(tokens_per_second=500, ttft_ms=5, context_window=100)
        self.counts_as_it_goes = counts_as_it_goes
        self.bodies: list[dict] = []
        self.cancelled = trio.Event()
        self.status = 200
        self.loaded = ["big"]
        self.break_after: int | None = None
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/embeddings", self.embed, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def models(self, request):
        return JSONResponse({"object": "list", "data": [{"id": name} for name in self.loaded]})

    async def complete(self, request):
        body = json.loads(await request.body())
        self.bodies.append(body)
        if self.status != 200:
            return JSONResponse({"error": {"message": "the reason"}}, status_code=self.status)
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def embed(self, request):
        body = json.loads(await request.body())
        self.bodies.append(body)
        if self.status != 200:
            return JSONResponse({"error": {"message": "the reason"}}, status_code=self.status)
        rows = [
            {"index": index, "embedding": [3.0, float(len(text))]}
            for index, text in enumerate(body["input"])
        ]
        return JSONResponse({"data": rows[::-1], "usage": {"prompt_tokens": len(rows)}})

    async def stream(self, body):
        chat = "messages" in body
        prompt = (
            tuple(ChatMessage(m["role"], m["content"]) for m in body["messages"])
            if chat
            else body["prompt"]
        )
        sampling = SamplingParams(
            max_tokens=body["max_tokens"], seed=body["seed"], n=body.get("n", 1)
        )
        if sampling.n > 1:
            async for chunk in self.stream_several(GenerationRequest("x", prompt, sampling)):
                yield chunk
            return
        counted, held = 0, ""
        try:
            async with self.engine.generate(GenerationRequest("x", prompt, sampling)) as events:
                async for event in events:
                    counted += 1
                    held += event.text
                    usage = {"prompt_tokens": event.input_tokens, "completion_tokens": counted}
                    if counted == self.break_after:
                        return
                    # Two tokens in a chunk, as servers send them that are busy.
                    if counted % 2 == 0 or event.finish_reason:
                        choice = {"index": 0, "finish_reason": None}
                        choice |= {"delta": {"content": held}} if chat else {"text": held}
                        held = ""
                        running = usage if self.counts_as_it_goes else None
                        yield line({"choices": [choice], "usage": running})
            yield line(
                {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "length"}]}
            )
            yield line({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        except trio.Cancelled:
            self.cancelled.set()
            raise

    async def stream_several(self, wanted):
        """Several answers to a chat, a token in a chunk; the last token only in the count."""
        async with self.engine.generate(wanted) as events:
            async for event in events:
                said = {"index": event.index, "delta": {"content": event.text}}
                if event.finish_reason:
                    said = {"index": event.index, "delta": {}, "finish_reason": "length"}
                yield line({"choices": [said]})
        counts = {"prompt_tokens": 9, "completion_tokens": 7 * wanted.sampling.n}
        details = {"prompt_tokens_details": {"cached_tokens": 4}}
        yield line({"choices": [], "usage": counts | details})
        yield b"data: [DONE]\n\n"


def line(chunk) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


@asynccontextmanager
async def serving(*, counts_as_it_goes=True, **options):
    server = Server(counts_as_it_goes=counts_as_it_goes)
    config = Config()
    config.bind = ["127.0.0.1:0"]
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        run = partial(serve, server.app, config, shutdown_trigger=stop.wait)
        (url,) = await nursery.start(run)
        settings = {"model": "big", "context_window": 100} | options
        async with open_openai_engine(
            OpenAIEngineConfig(base_url=f"{url}/v1", **settings)
        ) as engine:
            await engine.wait_ready()
            yield engine, server
        nursery.cancel_scope.cancel()


def request(prompt=HELLO, *, resume=(), **sampling) -> GenerationRequest:
    params = SamplingParams(**({"max_tokens": 7, "seed": 3} | sampling))
    return GenerationRequest("r", prompt, params, resume_token_ids=resume)


async def answer(engine, wanted):
    async with engine.generate(wanted) as events:
        return [event async for event in events]


@pytest.mark.parametrize("counts_as_it_goes", [True, False])
@pytest.mark.parametrize("prompt", [HELLO, "hello there"])
async def test_the_counts_are_the_servers(counts_as_it_goes, prompt):
    async with serving(counts_as_it_goes=counts_as_it_goes) as (engine, server):
        events = await answer(engine, request(prompt))
        own = await answer(server.engine, request(prompt))
        assert "".join(e.text for e in events) == "".join(e.text for e in own)
        ids = [token for event in events for token in event.token_ids]
        assert ids == list(range(7))
        assert events[-1].finish_reason is FinishReason.LENGTH
        assert events[-1].input_tokens == own[-1].input_tokens
        assert events[0].input_tokens == (own[0].input_tokens if counts_as_it_goes else 0)
        assert engine.statistics().generated_tokens == 7
        assert engine.statistics().running == 0


async def test_sampling_crosses_and_what_does_nothing_is_left_out():
    async with serving() as (engine, server):
        await answer(engine, request(temperature=0.3, stop=("x",), seed=2**40 + 5, top_k=4))
        (body,) = server.bodies
        assert body["model"] == "big"
        assert (body["temperature"], body["stop"], body["top_k"]) == (0.3, ["x"], 4)
        assert 0 <= body["seed"] < 2**31
        assert not {"min_p", "logit_bias", "repetition_penalty", "ignore_eos"} & body.keys()


async def test_leaving_closes_the_stream_at_the_server():
    async with serving() as (engine, server):
        async with engine.generate(request(max_tokens=90)) as events:
            await anext(events)
        with trio.fail_after(5):
            await server.cancelled.wait()
        assert engine.statistics().running == 0


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, PromptRefused), (422, PromptRefused), (429, EngineBusy), (503, EngineBusy),
     (404, EngineDead), (500, EngineDead)],
)  # fmt: skip
async def test_a_status_becomes_the_engines_error_and_keeps_its_reason(status, error):
    async with serving() as (engine, server):
        server.status = status
        with pytest.raises(error, match="the reason"):
            await answer(engine, request())


async def test_a_broken_stream_is_a_dead_engine():
    async with serving() as (engine, server):
        server.break_after = 5
        with pytest.raises(EngineDead, match="broke off"):
            await answer(engine, request())


async def test_a_line_without_end_is_a_dead_engine(monkeypatch):
    monkeypatch.setattr("pinaivu_node.engine.openai.engine._MAX_LINE_BYTES", -1)
    async with serving() as (engine, _):
        with pytest.raises(EngineDead, match="line without end"):
            await answer(engine, request())


@pytest.mark.parametrize("parameters", ['{"a": "\\ud800"}', "[" * 900 + "]" * 900, '{"a": 1e999}'])
async def test_no_request_causes_anything_but_an_error_of_an_engine(parameters):
    async with serving() as (engine, server):
        asked = replace(request(), tools=ToolUse((Tool("f", parameters=parameters),)))
        try:
            await answer(engine, asked)
        except EngineError:
            assert not server.bodies
        assert len(await answer(engine, request()))


async def test_a_server_that_comes_back_is_ready_again(monkeypatch):
    monkeypatch.setattr("pinaivu_node.engine.openai.engine._PROBE_S", 0.01)
    monkeypatch.setattr("pinaivu_node.engine.openai.engine._IDLE_PROBE_S", 0.01)
    async with serving() as (engine, server):
        for loaded in ([], ["big"]):
            server.loaded = loaded
            with trio.fail_after(5):
                while engine.statistics().ready != bool(loaded):  # noqa: ASYNC110 - over HTTP
                    await trio.sleep(0.01)


async def test_its_own_bound_and_what_it_cannot_do():
    async with serving(capacity=1) as (engine, _):
        with pytest.raises(PromptRefused, match="begun elsewhere"):
            await answer(engine, request(resume=(1,)))
        with pytest.raises(PromptRefused, match="1 to 1 answers"):
            await answer(engine, request(n=2))
        async with engine.generate(request(max_tokens=90)):
            with pytest.raises(EngineBusy):
                await answer(engine, request())


async def test_a_server_that_is_not_there_or_lacks_the_model_is_reported():
    absent = OpenAIEngineConfig(
        base_url="http://127.0.0.1:9/v1", model="big", context_window=100, ready_timeout_s=0.2
    )
    async with open_openai_engine(absent) as engine:
        with pytest.raises(EngineDead, match="not ready"):
            await engine.wait_ready()
        with pytest.raises(EngineDead, match="failed"):
            await answer(engine, request())
    with pytest.raises(BaseExceptionGroup) as caught:
        async with serving(model="small", ready_timeout_s=0.2):
            pass
    assert caught.group_contains(EngineDead, match="serves big, not small")


async def test_several_answers_come_side_by_side_and_each_has_its_end():
    async with serving() as (engine, server):
        events = await answer(engine, request(n=3))
        for index in range(3):
            own = [event for event in events if event.index == index]
            assert [t for event in own for t in event.token_ids] == list(range(7))
            assert [event.finish_reason for event in own] == [None] * 6 + [FinishReason.LENGTH]
        assert len({"".join(e.text for e in events if e.index == i) for i in range(3)}) == 3
        statistics = engine.statistics()
        assert (statistics.generated_tokens, statistics.running) == (21, 0)
        assert (statistics.input_tokens, statistics.cached_tokens) == (9, 4)
        assert server.bodies[0]["n"] == 3


async def test_vectors_come_in_the_order_of_the_inputs_and_have_unit_length():
    async with serving() as (engine, server):
        inputs = tuple("x" * length for length in range(40))
        embeddings = await engine.embed(EmbeddingRequest("e", inputs))
        assert embeddings.input_tokens == 40
        assert embeddings.vectors[4] == (0.6, 0.8)
        assert [len(body["input"]) for body in server.bodies] == [32, 8]
        for wrong in ((), ("text", (1, 2))):
            with pytest.raises(PromptRefused):
                await engine.embed(EmbeddingRequest("e", wrong))
        server.status = 404
        with pytest.raises(PromptRefused, match="no embeddings: the reason"):
            await engine.embed(EmbeddingRequest("e", ("x",)))
        assert engine.statistics().running == 0
