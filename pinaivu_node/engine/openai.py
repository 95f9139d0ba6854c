"""Any OpenAI-compatible server as an engine: vLLM, SGLang, Ollama, llama.cpp and their kin.

Such a server gives text and, at the end, counts; it gives no token ids.  So the ids here are
positions in the answer, 0, 1, 2, …: their number is right, their values mean nothing.  They are
given out one per chunk, or as many as the server's running count says where it sends one; the last
event brings those that the final count still lacks.  For the same reason an answer of such a server
cannot be resumed elsewhere, nor one from elsewhere here.  `input_tokens` is 0 until the server has
told it: with a running count from the first chunk on, else only in the last event.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, cast

import httpx
import trio

from pinaivu_node.engine.config import OpenAIEngineConfig
from pinaivu_node.engine.gauge import Occupancy, SpeedGauge, Timing
from pinaivu_node.engine.types import (
    ChatMessage,
    EngineBusy,
    EngineDead,
    EngineStatistics,
    FinishReason,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
    TokenEvent,
)

_PROBE_S: Final = 1.0
"""Pause between two looks at a server that does not serve the model yet, or any more."""
_IDLE_PROBE_S: Final = 5.0
"""The same for one that does: a server that died idle should not be bid on for long."""
_MAX_LINE_BYTES: Final = 2**20
"""A chunk carries a few tokens; a megabyte without a line's end is no event stream."""
_MAX_ERROR_BYTES: Final = 65536
_SEED_MASK: Final = 2**31 - 1
"""Servers differ in the width of a seed; this much all of them take."""
_FINISH: Final = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.STOP,
}


class OpenAIEngine:
    """An `Engine` over HTTP.  Made by `open_openai_engine`."""

    def __init__(self, config: OpenAIEngineConfig, client: httpx.AsyncClient) -> None:
        self._config = config
        self._client = client
        self._gauge = SpeedGauge()
        self._running = 0
        self._ready = False

    async def wait_ready(self) -> None:
        """Wait until the server lists the model; EngineDead if it does not in good time."""
        reason = "no answer"
        with trio.move_on_after(self._config.ready_timeout_s):
            while True:
                reason = await self._probe()
                if not reason:
                    self._ready = True
                    return
                await trio.sleep(_PROBE_S)
        raise EngineDead(f"{self._config.base_url} is not ready: {reason}")

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[TokenEvent]]:
        """See `Engine.generate`; leaving the context closes the connection, which cancels."""
        if request.resume_token_ids:
            raise PromptRefused("This engine cannot continue an answer begun elsewhere.")
        if self._running >= self._config.capacity:
            raise EngineBusy(f"{self._running} requests are running")
        path, body = request_body(request, model=self._config.model)
        timing = Timing(asked=trio.current_time())
        self._running += 1
        try:
            async with self._posted(path, body) as response, aclosing(_data(response)) as data:
                yield _Answer(request.id, data, timing=timing, gauge=self._gauge)
        finally:
            self._gauge.finished(timing, running=self._running)
            self._running -= 1

    async def watch(self) -> None:
        """Keep `statistics().ready` true to the server, until cancelled."""
        while True:
            await trio.sleep(_IDLE_PROBE_S if self._ready else _PROBE_S)
            if self._running == 0:  # a stream that flows, or breaks, says more than a probe
                self._ready = not await self._probe()

    def statistics(self) -> EngineStatistics:
        """A snapshot, at once."""
        occupancy = Occupancy(running=self._running, queued=0, capacity=self._config.capacity)
        return EngineStatistics(
            ready=self._ready,
            running=self._running,
            queued=0,
            capacity=self._config.capacity,
            context_window=self._config.context_window,
            tokens_per_second=self._gauge.speed_estimate(occupancy),
            ttft_estimate_ms=self._gauge.ttft_estimate_ms(occupancy),
            restarts=0,
            generated_tokens=self._gauge.generated_tokens,
            device="server",
            dtype="server",
        )

    async def _probe(self) -> str:
        """Why the server cannot serve the model now; empty if it can."""
        try:
            response = await self._client.get("models")
            response.raise_for_status()
            names = [str(row["id"]) for row in response.json()["data"]]
        except httpx.HTTPError as exc:
            return repr(exc)
        except (ValueError, KeyError, TypeError):
            return "its list of models is unreadable"
        if self._config.model not in names:
            return f"it serves {', '.join(names) or 'nothing'}, not {self._config.model}"
        return ""

    @asynccontextmanager
    async def _posted(self, path: str, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        """The open stream of an answer; errors of the server become the engine's."""
        try:
            async with self._client.stream("POST", path, json=body) as response:
                if not response.is_success:
                    raise _refusal(response.status_code, await _error_text(response))
                yield response
        except httpx.HTTPError as exc:
            self._ready = False
            raise EngineDead(f"the server at {self._config.base_url} failed: {exc!r}") from exc


class _Answer:
    """The events of one streamed answer: an async iterator."""

    def __init__(
        self, request_id: str, data: AsyncIterator[bytes], *, timing: Timing, gauge: SpeedGauge
    ) -> None:
        self._request_id = request_id
        self._data = data
        self._timing = timing
        self._gauge = gauge
        self._given = 0
        self._input_tokens = 0
        self._counted: int | None = None
        """Tokens of the answer by the server's own count, once it told one."""
        self._finish: FinishReason | None = None
        self._over = False

    def __aiter__(self) -> _Answer:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._over:
            raise StopAsyncIteration
        try:
            async for data in self._data:
                event = self._event_of(data)
                if event is not None:
                    return event
        except httpx.HTTPError as exc:
            raise EngineDead(f"the connection to the server broke: {exc!r}") from exc
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as exc:
            raise EngineDead(f"the server's stream is unreadable: {exc!r}") from exc
        if self._finish is None:
            raise EngineDead("the server broke off its answer")
        self._over = True
        return self._event("", finish=self._finish)

    def _event_of(self, data: bytes) -> TokenEvent | None:
        """What one chunk means; None if it says nothing new."""
        chunk = json.loads(data)
        if "error" in chunk:
            self._over = True
            return self._event("", finish=FinishReason.ERROR, error=str(chunk["error"])[:500])
        if usage := chunk.get("usage"):
            self._input_tokens = int(usage["prompt_tokens"])
            self._counted = int(usage["completion_tokens"])
        text = ""
        for choice in chunk.get("choices", ())[:1]:
            text = (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
            if reason := choice.get("finish_reason"):
                self._finish = _FINISH.get(reason, FinishReason.STOP)
        return self._event(text) if text else None

    def _event(
        self, text: str, *, finish: FinishReason | None = None, error: str | None = None
    ) -> TokenEvent:
        due = self._given + bool(text) if self._counted is None else self._counted
        token_ids = tuple(range(self._given, due))
        self._given = max(self._given, due)
        self._gauge.tokens(self._timing, len(token_ids), now=trio.current_time())
        return TokenEvent(
            request_id=self._request_id,
            token_ids=token_ids,
            text=text,
            input_tokens=self._input_tokens,
            finish_reason=finish,
            error=error,
        )


def _bytes(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The body; httpx declares less than what it returns, and what it returns wants closing."""
    return cast("AsyncGenerator[bytes, None]", response.aiter_bytes())


async def _data(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The `data:` fields of a server-sent event stream up to [DONE]."""
    buffer = b""
    async with aclosing(_bytes(response)) as pieces:
        async for piece in pieces:
            *lines, buffer = (buffer + piece).split(b"\n")
            for line in lines:
                name, _, value = line.partition(b":")
                if name == b"data" and value.strip() == b"[DONE]":
                    return
                if name == b"data":
                    yield value
            if len(buffer) > _MAX_LINE_BYTES:
                raise ValueError("a line without end")


def request_body(request: GenerationRequest, *, model: str) -> tuple[str, dict[str, Any]]:
    """Where to post a request, and what."""
    body = {
        "model": model,
        "stream": True,
        # Servers that do not know the second option ignore it; those that do count as they go.
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **_sampling(request.sampling),
    }
    prompt = request.prompt
    if isinstance(prompt, str):
        return "completions", body | {"prompt": prompt}
    if prompt and isinstance(prompt[0], ChatMessage):
        messages = [{"role": turn.role, "content": turn.content} for turn in prompt]
        return "chat/completions", body | {"messages": messages}
    return "completions", body | {"prompt": list(prompt)}


def _sampling(sampling: SamplingParams) -> dict[str, Any]:
    """OpenAI's own fields always; other servers' extensions only where they would do something."""
    if sampling.logprobs is not None:
        raise PromptRefused("This engine does not report logprobs.")
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed & _SEED_MASK,
    }
    optional: dict[str, Any] = {
        "stop": list(sampling.stop),
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()},
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "ignore_eos": sampling.ignore_eos,
    }
    if sampling.repetition_penalty != 1.0:
        optional["repetition_penalty"] = sampling.repetition_penalty
    return fields | {name: value for name, value in optional.items() if value}


async def _error_text(response: httpx.Response) -> str:
    """What the server says went wrong, as far as it is worth reading."""
    raw = b""
    async with aclosing(_bytes(response)) as pieces:
        async for piece in pieces:
            raw += piece
            if len(raw) > _MAX_ERROR_BYTES:
                break
    try:
        answer = json.loads(raw)
        error = answer.get("error", answer)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (ValueError, AttributeError):
        return raw[:500].decode(errors="replace")


_BUSY: Final = (429, 503)
_REFUSED: Final = (400, 413, 422)


def _refusal(status: int, text: str) -> EngineBusy | PromptRefused | EngineDead:
    """A status of the server as an engine says it."""
    if status in _BUSY:
        return EngineBusy(f"the server is busy: {text}")
    if status in _REFUSED:
        return PromptRefused(text)
    return EngineDead(f"the server answers status {status}: {text}")


@asynccontextmanager
async def open_openai_engine(config: OpenAIEngineConfig) -> AsyncIterator[OpenAIEngine]:
    """An engine over this server, which is looked at from time to time until the context ends."""
    headers = {}
    if config.api_key is not None:
        headers["Authorization"] = f"Bearer {config.api_key.get_secret_value()}"
    timeout = httpx.Timeout(config.stall_timeout_s, connect=config.connect_timeout_s)
    limits = httpx.Limits(max_connections=config.capacity + 4)
    async with httpx.AsyncClient(
        base_url=config.base_url.rstrip("/") + "/",
        headers=headers,
        timeout=timeout,
        limits=limits,
        trust_env=False,  # the server is the operator's own neighbour, not behind a proxy
    ) as client:
        engine = OpenAIEngine(config, client)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.watch)
            yield engine
            nursery.cancel_scope.cancel()
