"""`/v1/chat/completions` and `/v1/completions`: from a request's bytes to the jobs it asks for."""

from __future__ import annotations

from typing import Final

import trio
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from pinaivu_gateway.answering import Answer, Request
from pinaivu_gateway.body import read_body
from pinaivu_gateway.context import Gateway, RequestContext, context_of
from pinaivu_gateway.fingerprints import fingerprint_chain
from pinaivu_gateway.jobs import JobOrder
from pinaivu_gateway.openai_schema import ChatRequest, CompletionRequest, parse_untrusted
from pinaivu_gateway.tools import tool_use_of
from pinaivu_gateway.translate import (
    Chance,
    Limits,
    chat_order,
    chat_turns,
    completion_order,
    context_window_of,
    prompts_of,
)
from pinaivu_node.protocol.ids import Milliseconds


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
        orders = self._orders(request, context)
        with gateway.slot():
            answer = Answer(gateway, context, request, orders, send)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(answer.cancel_when_gone, receive, nursery.cancel_scope)
                    await answer.run(nursery)
                    nursery.cancel_scope.cancel()
            finally:
                answer.account()

    def _orders(self, request: Request, context: RequestContext) -> tuple[JobOrder, ...]:
        """A job for each prompt; the first has the request id of the whole."""
        if isinstance(request, ChatRequest):
            return (self._chat_order(request, context),)
        limits = self._limits(request, context)
        return tuple(
            completion_order(request, prompt, self._chance(context, number), limits)
            for number, prompt in enumerate(prompts_of(request))
        )

    def _chat_order(self, request: ChatRequest, context: RequestContext) -> JobOrder:
        turns = chat_turns(request.messages)
        tools = tool_use_of(
            request.tools, request.tool_choice, parallel=request.parallel_tool_calls
        )
        tenant = context.authenticated.tenant
        limits = self._limits(request, context, fingerprint_chain(tenant, turns, tools))
        return chat_order(request, turns, self._chance(context, 0), limits, tools=tools)

    def _chance(self, context: RequestContext, number: int) -> Chance:
        gateway = self._gateway
        return Chance(
            request_id=gateway.new_request_id() if number else context.request_id,
            nonce=gateway.entropy(16),
            seed=int.from_bytes(gateway.entropy(4), "big"),
        )

    def _limits(
        self, request: Request, context: RequestContext, fingerprints: tuple[bytes, ...] = ()
    ) -> Limits:
        gateway = self._gateway
        return Limits(
            default_output_tokens=gateway.config.default_output_tokens,
            context_window=context_window_of(gateway.market.providers(), request.model),
            deadline_in=Milliseconds(round(1000 * gateway.config.request_timeout)),
            tenant=context.authenticated.tenant,
            fingerprints=fingerprints,
        )
