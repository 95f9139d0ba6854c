"""What this provider sells, and how much of it is left right now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from pinaivu_node.engine.fleet.residency import Residence, Standing
from pinaivu_node.engine.types import Engine
from pinaivu_node.protocol.ids import Digest, Milliseconds, ModelName
from pinaivu_node.protocol.market import NO_DELAY, JobKind, ModelOffer
from pinaivu_node.protocol.money import PriceList


class OnDemand(Protocol):
    """A model that shares its machine's memory with others, and may have to be loaded first."""

    def standing(self) -> Standing:
        """Where it is, and what a request made now would meet."""
        ...

    def anticipate(self) -> None:
        """Somebody wanted it who could not wait for it: have it ready for the next one."""
        ...


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
    on_demand: OnDemand | None = None
    """None for a model that is always loaded."""


@dataclass(frozen=True, slots=True)
class Stock:
    """One model as it stands at this moment."""

    offer: ModelOffer
    ready: bool
    """Whether its engine could start a generation now."""
    running: int
    """Jobs accepted and not yet over, those waiting in the engine included."""
    delay: Milliseconds = NO_DELAY
    """Until a job that came now could start: its model is still to be loaded."""
    has_room: bool = True
    """False while other models at work take the memory that this one would be loaded into."""

    @property
    def free(self) -> int:
        """How many more jobs would be taken on, none of them waiting for another."""
        return self.offer.capacity - self.running if self.has_room else 0

    @property
    def is_full(self) -> bool:
        """Whether no auction need wait for our bid."""
        return self.free <= 0


_ALWAYS_THERE: Final = Standing(Residence.WARM)


def stock_of(served: ServedModel, *, running: int) -> Stock:
    """What can be said of this model now, `running` of our jobs being in its engine."""
    statistics = served.engine.statistics()
    standing = _ALWAYS_THERE if served.on_demand is None else served.on_demand.standing()
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
        delay=Milliseconds(standing.delay_ms),
        has_room=standing.has_room,
    )


def ready_offers(stock: Mapping[ModelName, Stock]) -> tuple[ModelOffer, ...]:
    """What to announce: a model whose engine is down is not for sale."""
    return tuple(each.offer for each in _by_name(stock.values()) if each.ready)


def _by_name(stock: Iterable[Stock]) -> list[Stock]:
    return sorted(stock, key=lambda each: each.offer.model)
