"""Any OpenAI-compatible server as an engine: vLLM, SGLang, Ollama, llama.cpp and their kin.

What is posted is decided in `request.py`, and what comes back is read by `answer.py`,
which also says what the token ids here are: positions, for such a server tells none.  For the same
reason an answer of such a server cannot be resumed elsewhere, nor one from elsewhere here.
`input_tokens` is 0 until the server has told it: with a running count from the first chunk on, else
only in the last event.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, Final, cast

import httpx
import trio

from pinaivu_node.engine.config import OpenAIEngineConfig
from pinaivu_node.engine.gauge import Occupancy, SpeedGauge, Timing
from pinaivu_node.engine.openai.answer import ServerAnswer
from pinaivu_node.engine.openai.embeddings import embedding_bodies, read_embeddings
from pinaivu_node.engine.openai.request import request_body
from pinaivu_node.engine.types import (
    EmbeddingRequest,
    Embeddings,
    EngineBusy,
    EngineDead,
    EngineStatistics,
    GenerationRequest,
    PromptRefused,
    TokenEvent,
)

_PROBE_S: Final = 1.0
"""Pause between two looks at a server that does not serve the model yet, or any more."""
_IDLE_PROBE_S: Final = 5.0
"""The same for one that does: a server that died idle should not be bid on for long."""
_MAX_LINE_BYTES: Final = 2**20
"""A chunk carries a few tokens; a megabyte without a line's end is no event stream."""
_MAX_ERROR_BYTES: Final = 65536
_MAX_EMBEDDED_BYTES: Final = 8 * 2**20
"""32 vectors of 8,192 components, at 25 characters each, are 6.6 MB."""


class OpenAIEngine:
    """An `Engine` over HTTP.  Made by `open_openai_engine`."""

    def __init__(self, config: OpenAIEngineConfig, client: httpx.AsyncClient) -> None:
        self._config = config
        self._client = client
        self._gauge = SpeedGauge()
        self._running = 0
        self._ready = False
        self._input_tokens = 0
        self._cached_tokens = 0

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
        path, body = request_body(request, model=self._config.model)
        answers = request.sampling.n
        timing = Timing(asked=trio.current_time(), answers=answers)
        answer = ServerAnswer(request)
        with self._places(answers):
            try:
                async with self._posted(path, body) as response, aclosing(_data(response)) as data:
                    yield _Answer(data, answer, timing=timing, gauge=self._gauge)
            finally:
                self._gauge.finished(timing, running=self._running)
                self._input_tokens += answer.input_tokens
                self._cached_tokens += answer.cached_tokens

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """See `Engine.embed`; the inputs are posted in portions that every server takes."""
        vectors: list[tuple[float, ...]] = []
        input_tokens = 0
        with self._places(1):
            for path, body in embedding_bodies(request, model=self._config.model):
                async with self._posted(path, body) as response:
                    said = await _body(response, limit=_MAX_EMBEDDED_BYTES)
                portion = read_embeddings(said, count=len(body["input"]))
                vectors += portion.vectors
                input_tokens += portion.input_tokens
        self._input_tokens += input_tokens
        return Embeddings(tuple(vectors), input_tokens)

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
            load_progress=1.0 if self._ready else 0.0,
            input_tokens=self._input_tokens,
            cached_tokens=self._cached_tokens,
        )

    @contextmanager
    def _places(self, count: int) -> Iterator[None]:
        """Room for so many answers at once."""
        capacity = self._config.capacity
        if not 1 <= count <= capacity:
            raise PromptRefused(f"This engine gives 1 to {capacity} answers to a prompt.")
        if self._running + count > capacity:
            raise EngineBusy(f"{self._running} of {capacity} answers are being written")
        self._running += count
        try:
            yield
        finally:
            self._running -= count

    async def _probe(self) -> str:
        """Why the server cannot serve the model now; empty if it can."""
        try:
            response = await self._client.get("models")
            response.raise_for_status()
            names = [str(row["id"]) for row in response.json()["data"]]
        except httpx.HTTPError as exc:
            return repr(exc)
        except (ValueError, KeyError, TypeError, RecursionError):
            return "its list of models is unreadable"
        if self._config.model not in names:
            return f"it serves {', '.join(names) or 'nothing'}, not {self._config.model}"
        return ""

    @asynccontextmanager
    async def _posted(self, path: str, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        """The open stream of an answer; errors of the server become the engine's."""
        content, kind = _json(body), {"Content-Type": "application/json"}
        try:
            async with self._client.stream("POST", path, content=content, headers=kind) as response:
                if not response.is_success:
                    said = await _body(response, limit=_MAX_ERROR_BYTES)
                    raise _refusal(path, response.status_code, _error_text(said))
                yield response
        except httpx.HTTPError as exc:
            self._ready = False
            raise EngineDead(f"the server at {self._config.base_url} failed: {exc!r}") from exc


class _Answer:
    """The events of one streamed answer: an async iterator."""

    def __init__(
        self,
        data: AsyncIterator[bytes],
        answer: ServerAnswer,
        *,
        timing: Timing,
        gauge: SpeedGauge,
    ) -> None:
        self._data = data
        self._answer = answer
        self._timing = timing
        self._gauge = gauge
        self._waiting: deque[TokenEvent] = deque()
        """What one chunk said beyond its first event."""

    def __aiter__(self) -> _Answer:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._waiting:
            if self._answer.is_over:
                raise StopAsyncIteration
            self._waiting += await self._read()
        event = self._waiting.popleft()
        self._gauge.tokens(self._timing, len(event.token_ids), now=trio.current_time())
        return event

    async def _read(self) -> list[TokenEvent]:
        try:
            async for data in self._data:
                if events := self._answer.read(data):
                    return events
        except httpx.HTTPError as exc:
            raise EngineDead(f"the connection to the server broke: {exc!r}") from exc
        return self._answer.end()


def _json(body: dict[str, Any]) -> bytes:
    """Every letter that is not ASCII as an escape, which half a surrogate pair can be, too."""
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (ValueError, RecursionError) as exc:
        raise PromptRefused(f"The request cannot be said in JSON: {exc}.") from exc


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
                raise EngineDead("the server sends a line without end")


async def _body(response: httpx.Response, *, limit: int) -> bytes:
    """What the server answers, up to the first piece beyond the limit."""
    raw = bytearray()
    async with aclosing(_bytes(response)) as pieces:
        async for piece in pieces:
            raw += piece
            if len(raw) > limit:
                break
    return bytes(raw)


def _error_text(raw: bytes) -> str:
    """What the server says went wrong, as far as it is worth reading."""
    try:
        answer = json.loads(raw)
        error = answer.get("error", answer)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (ValueError, AttributeError, RecursionError):
        return raw[:500].decode(errors="replace")


_BUSY: Final = (429, 503)
_REFUSED: Final = (400, 413, 422)
_NOT_THERE: Final = (404, 405, 501)


def _refusal(path: str, status: int, text: str) -> EngineBusy | PromptRefused | EngineDead:
    """A status of the server as an engine says it."""
    if path == "embeddings" and status in _NOT_THERE:
        return PromptRefused(f"this engine makes no embeddings: {text}")
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
