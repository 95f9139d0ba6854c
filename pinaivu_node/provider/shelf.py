"""What this provider sells, and how much of it is left right now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pinaivu_node.engine.types import Engine
from pinaivu_node.protocol.ids import Digest, ModelName
from pinaivu_node.protocol.market import JobKind, ModelOffer
from pinaivu_node.protocol.money import PriceList


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model for sale and the engine that runs it; the engine belongs to whoever made it."""

    engine: Engine
    model: ModelName
    digest: Digest
    prices: PriceList
    kinds: tuple[JobKind, ...] = (JobKind.CHAT, JobKind.COMPLETION)
    licence: str = ""
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Stock:
    """One model as it stands at this moment."""

    offer: ModelOffer
    ready: bool
    """Whether its engine could start a generation now."""
    running: int
    """Jobs accepted and not yet over, those waiting in the engine included."""

    @property
    def free(self) -> int:
        """How many more jobs would start at once."""
        return self.offer.capacity - self.running


def stock_of(served: ServedModel, *, running: int) -> Stock:
    """What can be said of this model now, `running` of our jobs being in its engine."""
    statistics = served.engine.statistics()
    return Stock(
        offer=ModelOffer(
            model=served.model,
            digest=served.digest,
            context_window=statistics.context_window,
            capacity=statistics.capacity,
            prices=served.prices,
            kinds=served.kinds,
            licence=served.licence,
            owner=served.owner,
        ),
        ready=statistics.ready,
        running=running,
    )


def ready_offers(stock: Mapping[ModelName, Stock]) -> tuple[ModelOffer, ...]:
    """What to announce: a model whose engine is down is not for sale."""
    return tuple(each.offer for each in _by_name(stock.values()) if each.ready)


def _by_name(stock: Iterable[Stock]) -> list[Stock]:
    return sorted(stock, key=lambda each: each.offer.model)
