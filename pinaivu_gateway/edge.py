"""The edge around all routes: a request id, the key, one error format, the count.

A plain ASGI app and not a middleware of the framework: it is passed through by every event of
every stream.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import trio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pinaivu_gateway.body import ClientGone
from pinaivu_gateway.context import Gateway, RequestContext, put_context
from pinaivu_gateway.errors import (
    BUG,
    NO_KEY,
    SERVER,
    STOPPING,
    WRONG_KEY,
    Problem,
    RequestRefused,
    http_problem,
)
from pinaivu_gateway.keys import ApiKey, bearer_untrusted
from pinaivu_gateway.store import StoreError

logger = logging.getLogger(__name__)

CLIENT_GONE: Final = 499
"""Only counted: nobody is there to be told."""
_STORE_AWAY: Final = Problem(
    503, "Keys cannot be checked now.", "key_store_unavailable", None, SERVER, {"retry-after": "2"}
)


class _Tap:
    """Adds the request id to the response, and remembers what was sent of it."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send: Final = send
        self._request_id: Final = request_id.encode()
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._request_id)]
            message = {**message, "headers": headers}
        await self._send(message)


class Edge:
    """Every HTTP request passes through here, once."""

    def __init__(self, routes: ASGIApp, gateway: Gateway, names: Mapping[Any, str]) -> None:
        """`names`: the path pattern of each endpoint, for the metrics."""
        self._routes: Final = routes
        self._gateway: Final = gateway
        self._names: Final = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; raises nothing but cancellation."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        context = RequestContext(self._gateway.new_request_id(), trio.current_time())
        put_context(scope, context)
        scope["app"] = self  # the router then raises its 405 instead of sending its own
        tap = _Tap(send, context.request_id)
        problem = await self._serve(scope, receive, tap, context)
        if problem is not None and tap.status is None:
            await send_problem(tap, problem)
        name = self._names.get(scope.get("endpoint"), "other")
        self._gateway.metrics.answered(name, tap.status or CLIENT_GONE)

    async def _serve(
        self, scope: Scope, receive: Receive, tap: _Tap, context: RequestContext
    ) -> Problem | None:
        try:
            if scope["path"].startswith("/v1") and scope["method"] != "OPTIONS":
                context.key = await self._authenticate(Headers(scope=scope))
            await self._routes(scope, receive, tap)
        except RequestRefused as refused:
            return refused.problem
        except HTTPException as exc:
            headers = dict(exc.headers or {})
            method, path = scope["method"], scope["path"]
            return http_problem(exc.status_code, method=method, path=path, headers=headers)
        except ClientGone:
            return None
        except Exception:
            logger.exception("request %s failed", context.request_id)
            return BUG
        return None

    async def _authenticate(self, headers: Headers) -> ApiKey:
        if self._gateway.is_stopping:
            raise RequestRefused(STOPPING)
        given = bearer_untrusted(headers.get("authorization"))
        if given is None:
            raise RequestRefused(NO_KEY)
        try:
            key = await self._gateway.keyring.find(given)
        except StoreError as exc:
            logger.warning("cannot authenticate: %s", exc)
            raise RequestRefused(_STORE_AWAY) from exc
        if key is None:
            raise RequestRefused(WRONG_KEY)
        return key


async def send_json(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    """A whole JSON response."""
    fields = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode("latin-1")) for name, value in headers.items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def send_problem(send: Send, problem: Problem) -> None:
    """A whole error response."""
    headers = {name.lower(): value for name, value in problem.headers.items()}
    await send_json(send, problem.status, problem.as_body(), headers)
