"""What the routes share, and what is known of one request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from starlette.types import Scope

from pinaivu_gateway.config import HttpConfig
from pinaivu_gateway.errors import SERVER, STOPPING, Problem, RequestRefused
from pinaivu_gateway.jobs import Market
from pinaivu_gateway.keyring import Keyring
from pinaivu_gateway.keys import ApiKey
from pinaivu_gateway.metrics import Metrics
from pinaivu_gateway.usage_log import UsageLog
from pinaivu_node.protocol.ids import RequestId, UnixMilliseconds, request_id_of

Clock = Callable[[], UnixMilliseconds]
Entropy = Callable[[int], bytes]
"""As many random bytes as asked for."""

_BUSY: Final = Problem(
    503,
    "The gateway is answering as many requests as it can. Please try again shortly.",
    "server_is_overloaded",
    None,
    SERVER,
    {"retry-after": "1"},
)


@dataclass(slots=True)
class Gateway:
    """One gateway process, as its routes see it."""

    market: Market
    keyring: Keyring
    usage: UsageLog
    metrics: Metrics
    config: HttpConfig
    clock: Clock
    entropy: Entropy
    started_at: UnixMilliseconds
    is_stopping: bool = False
    running: int = field(default=0, init=False)

    def new_request_id(self) -> RequestId:
        """Unique for ever."""
        return request_id_of(self.entropy(16))

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """A place among the running jobs.  Raises RequestRefused if there is none."""
        if self.is_stopping:
            raise RequestRefused(STOPPING)
        if self.running >= self.config.max_requests:
            raise RequestRefused(_BUSY)
        self.running += 1
        self.metrics.streams.set(self.running)
        try:
            yield
        finally:
            self.running -= 1
            self.metrics.streams.set(self.running)


@dataclass(slots=True)
class RequestContext:
    """Made at the edge for every request, and kept in its scope."""

    request_id: RequestId
    started: float
    key: ApiKey | None = None

    @property
    def authenticated(self) -> ApiKey:
        """The key of a request under /v1; the edge let nobody in without one."""
        if self.key is None:
            raise AssertionError("a route under /v1 was reached without a key")
        return self.key


_KEY: Final = "pinaivu"


def put_context(scope: Scope, context: RequestContext) -> None:
    """Leave it for the routes."""
    scope[_KEY] = context


def context_of(scope: Scope) -> RequestContext:
    """What the edge left."""
    context: RequestContext = scope[_KEY]
    return context
