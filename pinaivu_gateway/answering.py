"""One answer on its way to its client: its jobs are bought, their text is handed on.

The response begins only when `Market.buy` has entered, that is, with the first token: everything
that fails before it is plain JSON with a status of its own.  Two tasks serve a request: one sends,
and one waits for the client to leave, which cancels its jobs, streamed or not.  Several prompts are
several jobs side by side, and one of them that fails ends them all.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import trio
from starlette.types import Receive, Send

from pinaivu_gateway.body import wait_until_gone
from pinaivu_gateway.context import Gateway, RequestContext
from pinaivu_gateway.edge import send_json, send_problem
from pinaivu_gateway.errors import Asked, problem_of
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
from pinaivu_gateway.openai_schema import ChatRequest, CompletionRequest
from pinaivu_gateway.reply import Choice, Reply, finish_reason_of, usage_of
from pinaivu_gateway.sse import HEADERS, PING, ChunkTemplate, event
from pinaivu_gateway.store import UsageRow
from pinaivu_gateway.translate import context_window_of
from pinaivu_node.protocol.ids import NanoX
from pinaivu_node.protocol.money import NOTHING, ZERO_USAGE, TokenUsage

logger = logging.getLogger(__name__)

Request = ChatRequest | CompletionRequest
OVERTIME: Final = 5.0
"""Seconds past the deadline in which the market itself should have said so."""


@dataclass(slots=True)
class _Part:
    """One job and its choices."""

    order: JobOrder
    choices: list[Choice]
    delivered: int = 0
    usage: TokenUsage | None = None
    cost: NanoX = NOTHING
    finish: str = "cancelled"
    templates: list[ChunkTemplate] = field(default_factory=list)
    openings: list[bytes] = field(default_factory=list)
    """What goes before the first text of each choice, or nothing any more."""


class Answer:
    """One answer on its way to its client."""

    def __init__(
        self,
        gateway: Gateway,
        context: RequestContext,
        request: Request,
        orders: tuple[JobOrder, ...],
        send: Send,
    ) -> None:
        self._gateway: Final = gateway
        self._context: Final = context
        self._request: Final = request
        self._parts: Final = [
            _Part(order, _choices_of(request, order, first=number * request.n))
            for number, order in enumerate(orders)
        ]
        self._send: Final = send
        self._turn: Final = trio.Lock() if len(orders) > 1 else contextlib.nullcontext()
        self._unfinished = len(orders)
        self._asked: Final = Asked(
            model=request.model,
            prompt_param="messages" if isinstance(request, ChatRequest) else "prompt",
            context_window=context_window_of(gateway.market.providers(), request.model),
        )
        self._is_streaming = False
        self._is_whole = False
        self._is_sending = False
        self._last_sent = 0.0

    async def run(self, nursery: trio.Nursery) -> None:
        """Buy the jobs and send the answer, or the error; raises nothing of the market's."""
        try:
            with trio.move_on_after(self._gateway.config.request_timeout + OVERTIME) as scope:
                await self._buy_all(nursery)
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
        for part in self._parts:
            usage = part.usage or ZERO_USAGE.model_copy(update={"output": part.delivered})
            metrics = self._gateway.metrics
            metrics.tokens(prompt=usage.prompt, cached=usage.cached_input, completion=usage.output)
            if not part.delivered and part.usage is None:
                continue  # nothing was bought
            metrics.duration.observe(trio.current_time() - self._context.started)
            self._gateway.usage.record(
                UsageRow(
                    request_id=part.order.request_id,
                    key_prefix=self._context.authenticated.prefix,
                    model=part.order.model,
                    prompt_tokens=usage.prompt,
                    cached_tokens=usage.cached_input,
                    completion_tokens=usage.output,
                    finish=part.finish,
                    at=self._gateway.clock(),
                )
            )

    # --- jobs -------------------------------------------------------------------------------------

    async def _buy_all(self, outer: trio.Nursery) -> None:
        if len(self._parts) == 1:
            await self._buy(self._parts[0], outer)
            return
        failures: list[JobError] = []

        async def buy(part: _Part) -> None:
            # Kept, and raised outside: a nursery would wrap it.
            try:
                await self._buy(part, outer)
            except JobError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for part in self._parts:
                nursery.start_soon(buy, part)
        if failures:
            raise failures[0]

    async def _buy(self, part: _Part, nursery: trio.Nursery) -> None:
        gateway = self._gateway
        async with gateway.market.buy(part.order) as job:
            gateway.metrics.first_token.observe(trio.current_time() - self._context.started)
            if job.failovers:
                gateway.metrics.failovers.inc(job.failovers)
            reply = Reply(
                request_ids=tuple(each.order.request_id for each in self._parts),
                model=self._request.model,
                created=gateway.clock() // 1000,
                is_chat=isinstance(self._request, ChatRequest),
                model_digest=job.model_digest,
            )
            if self._request.stream:
                await self._stream(part, job, reply, nursery)
            else:
                await self._collect(part, job, reply)
            if part.usage is None:
                raise StreamBroken("the provider's answer ended without a result")

    async def _collect(self, part: _Part, job: Job, reply: Reply) -> None:
        async with _events(job) as events:
            async for each in events:
                if isinstance(each, TextDelta):
                    part.delivered += len(each.token_ids)
                    choice = part.choices[each.index]
                    choice.keep(each)
                    if each.finish is not None:
                        choice.finish = finish_reason_of(each.finish)
                    continue
                self._finished(part, each)
                if self._unfinished:
                    continue
                choices = [choice.whole() for it in self._parts for choice in it.choices]
                whole = reply.whole(choices, self._usage())
                self._is_whole = True
                body = json.dumps(whole, ensure_ascii=False).encode("utf-8", "replace")
                await send_json(self._send, 200, body, {})

    async def _stream(self, part: _Part, job: Job, reply: Reply, nursery: trio.Nursery) -> None:
        options = self._request.stream_options
        for choice in part.choices:
            template = ChunkTemplate(
                reply.head(chunk=True),
                chat=reply.is_chat,
                include_usage=options is not None and options.include_usage,
                index=choice.index,
            )
            part.templates.append(template)
            echo = template.text(choice.echo) if choice.echo else b""
            part.openings.append(template.opening() + echo)
        if not self._is_streaming:
            await self._begin_stream(nursery)
        async with _events(job) as events:
            async for each in events:
                if isinstance(each, TextDelta):
                    chunks = self._chunks(part, each)
                    if chunks:
                        await self._send_events(chunks)
                    continue
                last = self._last_chunks(part, each)
                self._is_whole = not self._unfinished
                # Some clients wait for the end of the body, so it ends with the last event.
                await self._send_events(last, more=not self._is_whole)

    def _chunks(self, part: _Part, delta: TextDelta) -> bytes:
        index = delta.index
        part.delivered += len(delta.token_ids)
        said = part.choices[index].take(delta)
        template, chunks = part.templates[index], b""
        if said.text or delta.logprobs:
            chunks = template.text(said.text, said.logprobs)
        if said.calls:
            chunks += template.calls(said.calls)
        if delta.finish is not None:
            chunks += template.finish(finish_reason_of(delta.finish))
        if chunks and part.openings[index]:
            chunks = part.openings[index] + chunks
            part.openings[index] = b""
        return chunks

    def _last_chunks(self, part: _Part, finished: JobFinished) -> bytes:
        self._finished(part, finished)
        chunks = b""
        if len(part.choices) == 1:  # of several, each has said so itself
            chunks = part.openings[0] + part.templates[0].finish(part.finish)
        if not self._unfinished:
            chunks += part.templates[0].end(self._usage())
        return chunks

    def _finished(self, part: _Part, finished: JobFinished) -> None:
        part.usage, part.cost = finished.usage, finished.cost
        part.finish = finish_reason_of(finished.finish)
        if len(part.choices) == 1:
            part.choices[0].finish = part.finish
        self._unfinished -= 1

    def _usage(self) -> dict[str, Any]:
        total = ZERO_USAGE
        for part in self._parts:
            total += part.usage or ZERO_USAGE
        return usage_of(total, NanoX(sum(part.cost for part in self._parts)))

    # --- sending ----------------------------------------------------------------------------------

    async def _fail(self, error: JobError) -> None:
        """Say what went wrong: as a response, or as the last event of a stream."""
        self._gateway.metrics.job_failed(error)
        if self._is_whole:
            # The client has everything; that the job was not closed properly is ours to know.
            logger.warning("request %s: %s", self._context.request_id, error)
            return
        for part in self._parts:
            part.finish = "error"
        problem = problem_of(error, self._asked)
        # Cancelled in its last send, the server would neither close the connection nor reuse it.
        self._is_whole = True
        if not self._is_streaming:
            await send_problem(self._send, problem)
            return
        # Neither a finish chunk nor [DONE]: clients would take the text for whole.
        await self._send_events(event(problem.as_json()), more=False)

    async def _begin_stream(self, nursery: trio.Nursery) -> None:
        self._is_streaming = True
        self._last_sent = trio.current_time()
        nursery.start_soon(self._ping)
        async with self._turn:
            await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})

    async def _send_events(self, events: bytes, *, more: bool = True) -> None:
        async with self._turn:
            self._is_sending = True
            await self._send({"type": "http.response.body", "body": events, "more_body": more})
            self._is_sending = False
            self._last_sent = trio.current_time()

    async def _ping(self) -> None:
        """Comments while there is no text, until the answer is whole."""
        interval = self._gateway.config.ping_interval
        while True:
            idle = trio.current_time() - self._last_sent
            if idle < interval:
                await trio.sleep(max(interval - idle, 0.001))
            elif self._is_whole:
                return
            elif self._is_sending:
                await trio.sleep(interval)  # the client does not even read what there is
            else:
                await self._send_events(PING)


def _choices_of(request: Request, order: JobOrder, *, first: int) -> list[Choice]:
    is_echoed = isinstance(request, CompletionRequest) and request.echo
    return [
        Choice(
            first + number,
            order.request_id,
            is_chat=isinstance(request, ChatRequest),
            has_logprobs=order.sampling.logprobs is not None,
            echo=(order.prompt.text or "") if is_echoed else "",
        )
        for number in range(request.n)
    ]


@contextlib.asynccontextmanager
async def _events(job: Job) -> AsyncIterator[AsyncIterator[JobEvent]]:
    """The job's events; if a generator makes them, it is closed and not left to the collector."""
    events = job.events()
    try:
        yield events
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()
