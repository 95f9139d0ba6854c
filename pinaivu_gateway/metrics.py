"""What Prometheus is told, from a registry of our own: two gateways in a process do not mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pinaivu_gateway.jobs import JobError, Market
from pinaivu_gateway.usage_log import UsageLog
from pinaivu_node.mesh.mesh import Mesh

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class _Snapshot(Collector):
    """Asks an object for its statistics when Prometheus does; every number becomes a gauge."""

    def __init__(self, prefix: str, take: Callable[[], Any]) -> None:
        self._prefix: Final = prefix
        self._take: Final = take

    def collect(self) -> Iterator[GaugeMetricFamily]:
        statistics = self._take()
        for each in fields(statistics):
            value = getattr(statistics, each.name)
            if isinstance(value, int | float):
                name = f"{self._prefix}_{each.name}"
                yield GaugeMetricFamily(name, each.name.replace("_", " "), value=float(value))


class Metrics:
    """The counters of the HTTP side, and at its side the market's and the mesh's."""

    def __init__(self, market: Market, mesh: Mesh | None, usage: UsageLog) -> None:
        self.registry: Final = CollectorRegistry()

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"pinaivu_gateway_{name}", words, labels, registry=self.registry)

        def seconds(name: str, words: str) -> Histogram:
            return Histogram(
                f"pinaivu_gateway_{name}_seconds", words, buckets=_SECONDS, registry=self.registry
            )

        self._requests: Final = counter("requests", "HTTP requests answered", "route", "status")
        self._job_errors: Final = counter("job_errors", "Jobs that failed, by error", "error")
        self._tokens: Final = counter("tokens", "Tokens of finished jobs", "kind")
        self.failovers: Final = counter("failovers", "Providers that failed before the answer came")
        self.first_token: Final = seconds("first_token", "Request to first token")
        self.duration: Final = seconds("duration", "Request to last token")
        self.streams: Final = Gauge(
            "pinaivu_gateway_requests_running", "Jobs being answered now", registry=self.registry
        )
        self.registry.register(_Snapshot("pinaivu_market", market.statistics))
        self.registry.register(_Snapshot("pinaivu_gateway_usage", usage.statistics))
        if mesh is not None:
            self.registry.register(_Snapshot("pinaivu_mesh", mesh.statistics))

    def answered(self, route: str, status: int) -> None:
        """Count a response; `route` is a path pattern, so that there are few of them."""
        self._requests.labels(route, str(status)).inc()

    def job_failed(self, error: JobError) -> None:
        """Count a failed job."""
        self._job_errors.labels(type(error).__name__).inc()

    def tokens(self, *, prompt: int, cached: int, completion: int) -> None:
        """Count the tokens of a job."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("cached").inc(cached)
        self._tokens.labels("completion").inc(completion)

    def page(self) -> bytes:
        """The metrics page."""
        return generate_latest(self.registry)
