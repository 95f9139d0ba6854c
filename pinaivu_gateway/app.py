"""The routes of the gateway as one ASGI app, and how it is served."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import trio
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from pinaivu_gateway.completions import Completions
from pinaivu_gateway.config import HttpConfig
from pinaivu_gateway.context import Clock, Gateway
from pinaivu_gateway.edge import Edge
from pinaivu_gateway.http_server import base_url, open_http
from pinaivu_gateway.jobs import Market
from pinaivu_gateway.keyring import Keyring
from pinaivu_gateway.metrics import CONTENT_TYPE, Metrics
from pinaivu_gateway.network import NetworkPages
from pinaivu_gateway.openai_schema import ChatRequest, CompletionRequest
from pinaivu_gateway.receipts import ReceiptPages
from pinaivu_gateway.store import Store
from pinaivu_gateway.usage_log import UsageLog
from pinaivu_node.mesh.mesh import Mesh
from pinaivu_node.protocol.ids import UnixMilliseconds

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # its stubs of trio, which libp2p installs, know no other

logger = logging.getLogger(__name__)

CORS_MAX_AGE: Final = 600


def unix_clock() -> UnixMilliseconds:
    """Now, in milliseconds since the epoch."""
    return UnixMilliseconds(time.time_ns() // 1_000_000)


async def serve_http(  # noqa: PLR0913 - what the routes need
    market: Market,
    store: Store,
    listener: socket.socket,
    config: HttpConfig,
    *,
    mesh: Mesh | None = None,
    clock: Clock = unix_clock,
    stop: trio.Event | None = None,
    task_status: TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the HTTP side on any market, until `stop` is set or until cancelled.

    Stopped, it finishes what runs; cancelled, it cuts it.  Starts with the base URL.
    """
    usage = UsageLog(store)
    gateway = Gateway(
        market=market,
        keyring=Keyring(store),
        usage=usage,
        metrics=Metrics(market, mesh, usage),
        config=config,
        clock=clock,
        entropy=secrets.token_bytes,
        started_at=clock(),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(usage.run)
        async with open_http(gateway_app(gateway), listener, config) as server:
            url = base_url(listener)
            logger.info("serving OpenAI's API at %s", url)
            task_status.started(url)
            await (trio.Event() if stop is None else stop).wait()
            gateway.is_stopping = True
            await server.drain()
        nursery.cancel_scope.cancel()


def gateway_app(gateway: Gateway) -> ASGIApp:
    """The whole HTTP surface."""
    routes = _routes(gateway)
    names: dict[Any, str] = {route.endpoint: route.path for route in routes}
    router = Router(routes, redirect_slashes=False, default=_no_such_route)
    # Any web page may call the gateway: what protects it is the key, which no browser adds by
    # itself; so credentials are not allowed and `*` is safe.
    return CORSMiddleware(
        Edge(router, gateway, names),
        allow_origins=["*"],
        allow_methods=["GET", "HEAD", "POST", "OPTIONS"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
        max_age=CORS_MAX_AGE,
    )


def _routes(gateway: Gateway) -> list[Route]:
    network, receipts, state = NetworkPages(gateway), ReceiptPages(gateway), StatePages(gateway)
    chat, raw = Completions(gateway, ChatRequest), Completions(gateway, CompletionRequest)
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", raw, methods=["POST"]),
        Route("/v1/models", network.models),
        Route("/v1/models/{model:path}", network.model),
        Route("/v1/nodes", network.nodes),
        Route("/v1/receipts/{request_id}", receipts.receipt),
        Route("/v1/receipts/{request_id}/bids", receipts.bids),
        Route("/health", state.health),
        Route("/metrics", state.metrics),
    ]


async def _no_such_route(scope: Scope, receive: Receive, send: Send) -> None:
    del scope, receive, send
    raise HTTPException(404)


class StatePages:
    """For the operator's own tools; open, since they say nothing about anybody's requests."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway: Final = gateway

    async def health(self, request: Request) -> Response:
        """200 if a request could be served now, as far as this process can tell."""
        del request
        market = self._gateway.market
        statistics = market.statistics()
        is_well = statistics.coordinator_connected and not self._gateway.is_stopping
        fields = {
            "status": "ok" if is_well else "unavailable",
            "providers": len(market.providers()),
            "requests_running": self._gateway.running,
            **asdict(statistics),
        }
        return JSONResponse(fields, status_code=200 if is_well else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' page."""
        del request
        return Response(self._gateway.metrics.page(), headers={"content-type": CONTENT_TYPE})
