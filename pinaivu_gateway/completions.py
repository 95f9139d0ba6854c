"""`/v1/chat/completions` and `/v1/completions`: buy a job, hand on its text.

The response begins only when `Market.buy` has entered, that is, with the first token: everything
that fails before it is plain JSON with a status of its own.  Two tasks serve a request: one sends,
and one waits for the client to leave, which cancels the job, streamed or not.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Final

import trio
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from pinaivu_gateway.body import read_body, wait_until_gone
from pinaivu_gateway.context import Gateway, RequestContext, context_of
from pinaivu_gateway.edge import send_json, send_problem
from pinaivu_gateway.errors import Asked, problem_of
from pinaivu_gateway.fingerprints import fingerprint_chain
from pinaivu_gateway.jobs import (
    DeadlinePassed,
    Job,
    JobError,
    JobEvent,
    JobFinished,
    JobOrder,
    StreamBroken,
    TextDelta,
)
from pinaivu_gateway.logprobs import chat_logprobs
from pinaivu_gateway.openai_schema import ChatRequest, CompletionRequest, parse_untrusted
from pinaivu_gateway.sse import HEADERS, PING, ChunkTemplate, event
from pinaivu_gateway.store import UsageRow
from pinaivu_gateway.tools import CallsSaid, tool_use_of
from pinaivu_gateway.translate import (
    FINISH_REASONS,
    Chance,
    Limits,
    Reply,
    chat_order,
    chat_turns,
    completion_order,
    context_window_of,
    usage_of,
)
from pinaivu_node.protocol.ids import Milliseconds
from pinaivu_node.protocol.inference import TokenLogprob
from pinaivu_node.protocol.money import ZERO_USAGE, TokenUsage

logger = logging.getLogger(__name__)

Request = ChatRequest | CompletionRequest
OVERTIME: Final = 5.0
"""Seconds past the deadline in which the market itself should have said so."""


class Completions:
    """The endpoint for one kind of request."""

    def __init__(self, gateway: Gateway, kind: type[ChatRequest | CompletionRequest]) -> None:
        self._gateway: Final = gateway
        self._kind: Final = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, until it is answered or its client has left."""
        gateway, context = self._gateway, context_of(scope)
        body = await read_body(receive, Headers(scope=scope), gateway.config)
        request = parse_untrusted(body, self._kind)
        order = self._order(request, context)
        with gateway.slot():
            answer = _Answer(gateway, context, request, order, send)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(answer.cancel_when_gone, receive, nursery.cancel_scope)
                    await answer.run(nursery)
                    nursery.cancel_scope.cancel()
            finally:
                answer.account()

    def _order(self, request: Request, context: RequestContext) -> JobOrder:
        gateway, key = self._gateway, context.authenticated
        chance = Chance(
            request_id=context.request_id,
            nonce=gateway.entropy(16),
            seed=int.from_bytes(gateway.entropy(4), "big"),
        )

        def limits(fingerprints: tuple[bytes, ...] = ()) -> Limits:
            return Limits(
                default_output_tokens=gateway.config.default_output_tokens,
                context_window=context_window_of(gateway.market.providers(), request.model),
                deadline_in=Milliseconds(round(1000 * gateway.config.request_timeout)),
                tenant=key.tenant,
                fingerprints=fingerprints,
            )

        if isinstance(request, CompletionRequest):
            return completion_order(request, chance, limits())
        turns = chat_turns(request.messages)
        tools = tool_use_of(
            request.tools, request.tool_choice, parallel=request.parallel_tool_calls
        )
        fingerprints = fingerprint_chain(key.tenant, turns, tools)
        return chat_order(request, turns, chance, limits(fingerprints), tools=tools)


@contextlib.asynccontextmanager
async def _events(job: Job) -> AsyncIterator[AsyncIterator[JobEvent]]:
    """The job's events; if a generator makes them, it is closed and not left to the collector."""
    events = job.events()
    try:
        yield events
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()


class _Answer:
    """One answer on its way to its client."""

    def __init__(
        self,
        gateway: Gateway,
        context: RequestContext,
        request: Request,
        order: JobOrder,
        send: Send,
    ) -> None:
        self._gateway: Final = gateway
        self._context: Final = context
        self._request: Final = request
        self._order: Final = order
        self._send: Final = send
        self._asked: Final = Asked(
            model=request.model,
            prompt_param="messages" if isinstance(request, ChatRequest) else "prompt",
            context_window=context_window_of(gateway.market.providers(), request.model),
        )
        self._is_streaming = False
        self._is_whole = False
        self._is_sending = False
        self._last_sent = 0.0
        self._delivered = 0
        self._usage: TokenUsage | None = None
        self._finish = "cancelled"

    async def run(self, nursery: trio.Nursery) -> None:
        """Buy the job and send the answer, or the error; raises nothing of the market's."""
        try:
            with trio.move_on_after(self._gateway.config.request_timeout + OVERTIME) as scope:
                await self._buy(nursery)
            if scope.cancelled_caught and not self._is_whole:
                raise DeadlinePassed("the answer did not come in time")
        except JobError as error:
            await self._fail(error)

    async def cancel_when_gone(self, receive: Receive, scope: trio.CancelScope) -> None:
        """Stop everything when the client leaves before it has everything."""
        await wait_until_gone(receive)
        # The server reports the end of an answer in the same way; the job is then closed in peace.
        if not self._is_whole:
            scope.cancel()

    def account(self) -> None:
        """Count what was used, however it ended.

        Of a broken answer the prompt's size is unknown here; its receipt knows it.
        """
        usage = self._usage or ZERO_USAGE.model_copy(update={"output": self._delivered})
        metrics = self._gateway.metrics
        metrics.tokens(prompt=usage.prompt, cached=usage.cached_input, completion=usage.output)
        if not self._delivered and self._usage is None:
            return  # nothing was bought
        metrics.duration.observe(trio.current_time() - self._context.started)
        self._gateway.usage.record(
            UsageRow(
                request_id=self._order.request_id,
                key_prefix=self._context.authenticated.prefix,
                model=self._order.model,
                prompt_tokens=usage.prompt,
                cached_tokens=usage.cached_input,
                completion_tokens=usage.output,
                finish=self._finish,
                at=self._gateway.clock(),
            )
        )

    async def _buy(self, nursery: trio.Nursery) -> None:
        gateway = self._gateway
        async with gateway.market.buy(self._order) as job:
            gateway.metrics.first_token.observe(trio.current_time() - self._context.started)
            if job.failovers:
                gateway.metrics.failovers.inc(job.failovers)
            reply = Reply(
                request_id=self._order.request_id,
                model=self._request.model,
                created=gateway.clock() // 1000,
                is_chat=isinstance(self._request, ChatRequest),
                model_digest=job.model_digest,
            )
            if self._request.stream:
                nursery.start_soon(self._ping)
                await self._stream(job, reply)
            else:
                await self._collect(job, reply)
            if not self._is_whole:
                raise StreamBroken("the provider's answer ended without a result")

    async def _collect(self, job: Job, reply: Reply) -> None:
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        calls = CallsSaid(self._order.request_id)
        async with _events(job) as events:
            async for each in events:
                if isinstance(each, TextDelta):
                    texts.append(each.text)
                    logprobs += each.logprobs
                    calls.deltas(each.tool_calls)
                    self._delivered += len(each.token_ids)
                    continue
                finish = self._finished(each)
                whole = reply.whole(
                    "".join(texts),
                    finish,
                    each.usage,
                    logprobs=self._logprobs_of(logprobs),
                    calls=calls.whole(),
                )
                self._is_whole = True
                body = json.dumps(whole, ensure_ascii=False).encode("utf-8", "replace")
                await send_json(self._send, 200, body, {})

    async def _stream(self, job: Job, reply: Reply) -> None:
        options = self._request.stream_options
        template = ChunkTemplate(
            reply.head(chunk=True),
            chat=reply.is_chat,
            include_usage=options is not None and options.include_usage,
        )
        await self._begin_stream()
        opening = template.opening()
        calls = CallsSaid(self._order.request_id)
        async with _events(job) as events:
            async for each in events:
                if isinstance(each, TextDelta):
                    self._delivered += len(each.token_ids)
                    chunks = b""
                    if each.text or each.logprobs:
                        chunks = template.text(each.text, self._logprobs_of(each.logprobs))
                    if each.tool_calls:
                        chunks += template.calls(calls.deltas(each.tool_calls))
                    if chunks:
                        await self._send_events(opening + chunks)
                        opening = b""
                    continue
                last = template.finish(self._finished(each), usage_of(each.usage))
                self._is_whole = True
                # Some clients wait for the end of the body, so it ends with the last event.
                await self._send_events(opening + last, more=False)

    def _logprobs_of(self, reported: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """What the client asked to be told, whatever the provider says of itself."""
        return None if self._order.sampling.logprobs is None else chat_logprobs(reported)

    def _finished(self, event_: JobFinished) -> str:
        self._usage = event_.usage
        reason = FINISH_REASONS.get(event_.finish)
        if reason is None:
            raise StreamBroken(f"the provider ended the answer early ({event_.finish})")
        self._finish = reason
        return reason

    async def _fail(self, error: JobError) -> None:
        """Say what went wrong: as a response, or as the last event of a stream."""
        self._gateway.metrics.job_failed(error)
        if self._is_whole:
            # The client has everything; that the job was not closed properly is ours to know.
            logger.warning("request %s: %s", self._order.request_id, error)
            return
        self._finish = "error"
        problem = problem_of(error, self._asked)
        # Cancelled in its last send, the server would neither close the connection nor reuse it.
        self._is_whole = True
        if not self._is_streaming:
            await send_problem(self._send, problem)
            return
        # Neither a finish chunk nor [DONE]: clients would take the text for whole.
        await self._send_events(event(problem.as_json()), more=False)

    async def _begin_stream(self) -> None:
        self._is_streaming = True
        self._last_sent = trio.current_time()
        await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})

    async def _send_events(self, events: bytes, *, more: bool = True) -> None:
        self._is_sending = True
        await self._send({"type": "http.response.body", "body": events, "more_body": more})
        self._is_sending = False
        self._last_sent = trio.current_time()

    async def _ping(self) -> None:
        """Comments while there is no text, until the answer is whole."""
        interval = self._gateway.config.ping_interval
        while True:
            idle = trio.current_time() - self._last_sent
            if idle < interval or not self._is_streaming:
                await trio.sleep(max(interval - idle, 0.001))
            elif self._is_whole:
                return
            elif self._is_sending:
                await trio.sleep(interval)  # the client does not even read what there is
            else:
                await self._send_events(PING)
