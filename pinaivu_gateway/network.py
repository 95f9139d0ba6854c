"""`/v1/models` and `/v1/nodes`: what the network can serve now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pinaivu_gateway.context import Gateway
from pinaivu_gateway.errors import RequestRefused, unknown_model
from pinaivu_gateway.jobs import ProviderView
from pinaivu_node.protocol.market import ModelOffer
from pinaivu_node.protocol.money import PriceList

FRESH_SECONDS: Final = 0.25
"""Pages ask for the models as they open, and a large network takes milliseconds to add up."""


class NetworkPages:
    """The routes."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway: Final = gateway
        self._models: list[dict[str, Any]] = []
        self._stale_at = float("-inf")

    async def models(self, request: Request) -> Response:
        """Every model that somebody serves."""
        del request
        return JSONResponse({"object": "list", "data": self._listing()})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name: str = request.path_params["model"]
        for each in self._listing():
            if each["id"] == name:
                return JSONResponse(each)
        raise RequestRefused(unknown_model(name))

    async def nodes(self, request: Request) -> Response:
        """Every provider, with what it serves."""
        del request
        data = [node_of(each) for each in self._gateway.market.providers()]
        return JSONResponse({"object": "list", "data": data})

    def _listing(self) -> list[dict[str, Any]]:
        now = trio.current_time()
        if now >= self._stale_at:
            created = self._gateway.started_at // 1000
            self._models = models_of(self._gateway.market.providers(), created=created)
            self._stale_at = now + FRESH_SECONDS
        return self._models


def models_of(providers: Sequence[ProviderView], *, created: int) -> list[dict[str, Any]]:
    """OpenAI's model objects, by name, with what clients of a market want to know besides."""
    offers: dict[str, list[ModelOffer]] = {}
    for provider in providers:
        for offer in provider.models:
            offers.setdefault(offer.model, []).append(offer)
    return [_model(name, offers[name], created) for name in sorted(offers)]


def _model(name: str, offers: list[ModelOffer], created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": _commonest(each.owner for each in offers) or "unknown",
        "context_window": max(each.context_window for each in offers),
        "licence": _commonest(each.licence for each in offers),
        "providers": len(offers),
        "capacity": sum(each.capacity for each in offers),
        "kinds": sorted({kind.value for each in offers for kind in each.kinds}),
        "prices": {
            "input": _range(offers, lambda each: each.input),
            "cached_input": _range(offers, lambda each: each.cached_input),
            "output": _range(offers, lambda each: each.output),
        },
    }


def _range(offers: list[ModelOffer], take: Callable[[PriceList], int]) -> dict[str, int]:
    """In NanoX per million tokens."""
    prices = [take(each.prices) for each in offers]
    return {"min": min(prices), "max": max(prices)}


def _commonest(words: Iterable[str]) -> str:
    """What most say; of equals the first by name, so that the answer does not flicker."""
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return min(counts, key=lambda word: (-counts[word], word))


def node_of(provider: ProviderView) -> dict[str, Any]:
    """A provider as JSON."""
    return {
        "peer": provider.peer,
        "addresses": list(provider.addresses),
        "connected": provider.connected,
        "models": [each.model_dump(mode="json") for each in provider.models],
    }
