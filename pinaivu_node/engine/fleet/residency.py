"""Which models stay in memory when not all of them fit: decided from what is known at one moment.

Pure.  Three rules hold whatever is asked:

* what is in memory, by what each model is known to need, never adds up to more than the budget;
* a model that works, or that somebody waits for, is never sent away;
* of the idle ones those go that were used longest ago, and no more of them than needed.

That nobody starves follows from the second: a model is loaded for those who wait for it, and stays
until each of them has been served.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Residence(StrEnum):
    """Where a model is between disk and memory."""

    COLD = "cold"
    """On disk; it would be loaded for the next request."""
    LOADING = "loading"
    WARM = "warm"
    FAILED = "failed"
    """It could not be loaded; it will be tried again."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """One model, as far as its place in memory is concerned."""

    name: str
    need: int
    """Bytes it takes in memory, by estimate or by measurement."""
    residence: Residence
    calls: int = 0
    """Requests that run in it or wait for it."""
    last_used: float = 0.0

    @property
    def resident(self) -> bool:
        """Whether its memory is taken, or promised to it."""
        return self.residence in (Residence.LOADING, Residence.WARM)

    @property
    def movable(self) -> bool:
        """Whether it may be sent away.  What is being loaded is not: nobody would gain by it."""
        return self.residence is Residence.WARM and self.calls == 0


@dataclass(frozen=True, slots=True)
class Room:
    """There is room for the model once these have left."""

    leaving: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NoRoom:
    """The model cannot be loaded now, or, if `ever` is False, at all."""

    reason: str
    ever: bool = True


@dataclass(frozen=True, slots=True)
class Standing:
    """How a model stands, for whoever sells it or looks on."""

    residence: Residence
    progress: float = 0.0
    """0 to 1 while it is being loaded."""
    delay_ms: int = 0
    """Until a request made now could begin; 0 if it is warm."""
    has_room: bool = True
    """Whether a request made now would be taken, as far as memory goes."""
    reason: str = ""
    """Why it failed, or why there is no room for it."""


def room_for(
    wanted: str, tenants: Sequence[Tenant], *, budget: int | None, idle_since: float = float("inf")
) -> Room | NoRoom:
    """Whether this model can be loaded now, and who has to leave for it.

    `budget` None is no limit.  Only models that were last used before `idle_since` are sent away.
    """
    if budget is None:
        return Room()
    need = next(each.need for each in tenants if each.name == wanted)
    if need > budget:
        return NoRoom(
            f"it needs {need / 1e9:.1f} GB of memory and the budget is {budget / 1e9:.1f} GB",
            ever=False,
        )
    others = [each for each in tenants if each.resident and each.name != wanted]
    excess = sum(each.need for each in others) + need - budget
    candidates = [each for each in others if each.movable and each.last_used <= idle_since]
    leaving = _fewest(candidates, excess)
    if leaving is not None:
        return Room(tuple(each.name for each in leaving))
    names = ", ".join(sorted(each.name for each in others if each not in candidates))
    return NoRoom(f"no memory for it while {names} is in use")


def over_budget(tenants: Sequence[Tenant], *, budget: int | None) -> tuple[str, ...]:
    """Who has to leave because models turned out to need more than was thought.

    A model that is too large by itself goes first: sending the others away would not help it.
    What is still too much then is at work, and is looked at again when it is done.
    """
    if budget is None:
        return ()
    giants = [each for each in tenants if each.movable and each.need > budget]
    rest = [each for each in tenants if each not in giants]
    excess = sum(each.need for each in rest if each.resident) - budget
    movable = [each for each in rest if each.movable]
    leaving = _fewest(movable, excess)
    return tuple(each.name for each in (*giants, *(movable if leaving is None else leaving)))


def first_to_load(tenants: Iterable[Tenant], *, budget: int | None) -> tuple[str, ...]:
    """Which models are loaded at the start: as many as fit, in the order given."""
    chosen: list[str] = []
    taken = 0
    for each in tenants:
        if budget is None or taken + each.need <= budget:
            chosen.append(each.name)
            taken += each.need
    return tuple(chosen)


def _fewest(candidates: Iterable[Tenant], excess: int) -> list[Tenant] | None:
    """Those who leave to free `excess` bytes, longest unused first; None if all are not enough.

    A small one that would have left before a large one made it needless stays.
    """
    leaving: list[Tenant] = []
    for each in sorted(candidates, key=lambda each: (each.last_used, each.name)):
        if excess <= 0:
            break
        leaving.append(each)
        excess -= each.need
    if excess > 0:
        return None
    for each in reversed(leaving.copy()):
        if excess + each.need <= 0:
            leaving.remove(each)
            excess += each.need
    return leaving
