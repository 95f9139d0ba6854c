"""Several models on one node: each loaded when it is asked for, and kept while there is memory.

A `Fleet` has one `FleetEngine` per model.  A request to a model that is not in memory loads it
first; `residency.py` decides who leaves for it.  Each stay in memory is a `Life` with a task of its
own, which holds the engine open:

    COLD --asked for--> LOADING --loaded--> WARM --sent away--> COLD
                           `----failed---> FAILED --after a pause, if there is room--> LOADING

Models are loaded one at a time and in order, and none before those that leave for it are gone: two
at once would only share one disk.  Memory is promised to a model from the moment it is decided.
An engine that dies when it is warm is restarted by itself; the fleet only sees it not ready.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import trio

from pinaivu_node.engine.fleet.berth import Berth, FleetModel, Life
from pinaivu_node.engine.fleet.residency import (
    NoRoom,
    Residence,
    Room,
    Standing,
    Tenant,
    first_to_load,
    over_budget,
    room_for,
)
from pinaivu_node.engine.types import (
    EmbeddingRequest,
    Embeddings,
    Engine,
    EngineBusy,
    EngineDead,
    EngineError,
    EngineStatistics,
    GenerationRequest,
    TokenEvent,
)

logger = logging.getLogger(__name__)

MemoryOf = Callable[[Engine], int | None]
"""Bytes that an engine takes now, None where nobody can say."""


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """What an operator may choose about several models."""

    budget: int | None
    """Bytes that models may take together; None: no limit."""
    max_waiting: int = 8
    """Requests that may wait for one model to be loaded; as many as an engine queues."""
    retry_pause_s: float = 30.0
    """After a failed load; doubles up to a quarter of an hour while loads fail."""
    settled_s: float = 60.0
    """A model that was used so recently is sent away for a request only, not on a guess."""


class FleetEngine:
    """One model of a fleet: an `Engine` that loads its model when it is asked."""

    def __init__(self, fleet: Fleet, berth: Berth) -> None:
        self._fleet = fleet
        self._berth = berth

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[TokenEvent]]:
        """See `Engine.generate`; entering waits for the model to be loaded.

        EngineBusy if there is no memory for it, if too many wait already, or if it is not loaded by
        the request's deadline; EngineDead if it cannot be loaded.  Cancelled, the load goes on.
        """
        asked = trio.current_time()
        async with self._fleet.hold(self._berth, deadline_ms=request.deadline_ms) as engine:
            left = _left(request.deadline_ms, since=asked)
            async with engine.generate(replace(request, deadline_ms=left)) as events:
                yield events

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """See `Engine.embed`, and `generate`."""
        asked = trio.current_time()
        async with self._fleet.hold(self._berth, deadline_ms=request.deadline_ms) as engine:
            left = _left(request.deadline_ms, since=asked)
            return await engine.embed(replace(request, deadline_ms=left))

    async def wait_ready(self) -> None:
        """Wait while the model is being loaded; EngineDead if that fails.

        A model that nobody has asked for is ready as it is: it would be loaded when it is asked.
        """
        life = self._berth.life
        if life is None:
            await trio.lowlevel.checkpoint()
        else:
            await life.settled.wait()
            if life.engine is not None:
                await life.engine.wait_ready()
                return
        if self._berth.failure is not None:
            raise _dead(self._berth, self._berth.failure)

    def statistics(self) -> EngineStatistics:
        """A snapshot, at once.

        A cold model is ready: asked now, it would answer, after a time to first token that has the
        load in it.
        """
        berth = self._berth
        known = berth.statistics()
        standing = self.standing()
        if standing.residence is Residence.WARM:
            return known
        return replace(
            known,
            ready=self._is_for_sale(),
            running=0,
            queued=berth.waiting,
            ttft_estimate_ms=standing.delay_ms + berth.first_token_ms,
            load_progress=standing.progress,
            kv_blocks_free=known.kv_blocks,
            prefix_horizon_s=0.0,
        )

    def standing(self) -> Standing:
        """Where the model is, and what a request made now would meet."""
        berth = self._berth
        residence = berth.residence
        delay = self._fleet.delay_ms(berth)
        if residence is Residence.WARM:
            return Standing(residence, progress=1.0)
        if residence is Residence.FAILED:
            return Standing(residence, has_room=False, reason=berth.failure or "")
        if berth.life is not None:
            waits = berth.waiting < self._fleet.config.max_waiting
            return Standing(residence, berth.life.progress, delay, has_room=waits)
        room = self._fleet.room_for(berth)
        if isinstance(room, NoRoom):
            return Standing(residence, delay_ms=delay, has_room=False, reason=room.reason)
        return Standing(residence, delay_ms=delay)

    def anticipate(self) -> None:
        """Somebody wanted this model who could not wait for it: load it, for the next one.

        Nothing happens if that would displace a model that was used within the last minute.
        """
        if self._berth.residence is Residence.COLD:
            self._fleet.begin_quietly(self._berth)

    def _is_for_sale(self) -> bool:
        """Whether a request would be answered, now or when others have made room."""
        if self._berth.life is not None:
            return self._berth.life.announced
        room = self._fleet.room_for(self._berth)
        return self._berth.failure is None and (isinstance(room, Room) or room.ever)


class Fleet:
    """The models of one node.  Made by `open_fleet`."""

    def __init__(
        self,
        models: Iterable[FleetModel],
        config: FleetConfig,
        nursery: trio.Nursery,
        *,
        memory_of: MemoryOf,
    ) -> None:
        self.config = config
        self._nursery = nursery
        self._memory_of = memory_of
        self._berths = {model.name: Berth(model) for model in models}
        self._leaving: set[Life] = set()
        self._line: list[Berth] = []
        """Those to be loaded, the one that is being loaded first.  Not a lock: tasks that are
        started together begin in any order, and models are loaded in the order given."""
        self.engines: Mapping[str, FleetEngine] = {
            name: FleetEngine(self, berth) for name, berth in self._berths.items()
        }
        """By name, in the order given."""

    def preload(self) -> None:
        """Begin to load as many models as fit, in the order given.

        They are announced when they are there, as a single model is.
        """
        for name in first_to_load(self._tenants(), budget=self.config.budget):
            self._start(self._berths[name], announced=False)

    @asynccontextmanager
    async def hold(self, berth: Berth, *, deadline_ms: int | None) -> AsyncIterator[Engine]:
        """The model's engine, loaded, which stays while the context is open."""
        berth.calls += 1
        try:
            within = math.inf if deadline_ms is None else deadline_ms / 1000
            yield await self._loaded(berth, within=within)
        finally:
            berth.calls -= 1
            berth.last_used = trio.current_time()
            if not berth.calls:
                self._measure(berth)
                self._relieve()

    def room_for(self, berth: Berth) -> Room | NoRoom:
        """Whether this model could be loaded for a request, and who would leave for it."""
        return room_for(berth.name, self._tenants(), budget=self.config.budget)

    def delay_ms(self, berth: Berth) -> int:
        """Until this model, asked for now, would be loaded: its turn has to come first."""
        now = trio.current_time()
        place = self._line.index(berth) if berth in self._line else len(self._line)
        ahead = sum(each.remaining_s(now=now) for each in self._line[:place])
        return round(1000 * (ahead + berth.remaining_s(now=now)))

    def begin_quietly(self, berth: Berth) -> bool:
        """Begin to load if that displaces nobody who was used lately; whether it was begun."""
        idle_since = trio.current_time() - self.config.settled_s
        room = room_for(
            berth.name, self._tenants(), budget=self.config.budget, idle_since=idle_since
        )
        if isinstance(room, Room):
            self._send_away(room.leaving)
            # One that failed has to prove itself before it is for sale again.
            self._start(berth, announced=berth.failure is None)
        return isinstance(room, Room)

    # --- one request ------------------------------------------------------------------------------

    async def _loaded(self, berth: Berth, *, within: float) -> Engine:
        life = berth.life or self._begin(berth)
        if life.engine is not None:
            return life.engine
        if berth.waiting >= self.config.max_waiting:
            raise EngineBusy(f"{berth.waiting} requests wait for {berth.name} to be loaded")
        berth.waiting += 1
        try:
            with trio.move_on_after(within):
                await life.settled.wait()
        finally:
            berth.waiting -= 1
        if life.engine is not None:
            return life.engine
        if life.failure is not None:
            raise _dead(berth, life.failure)
        raise EngineBusy(f"{berth.name} is still being loaded ({life.progress:.0%})")

    def _begin(self, berth: Berth) -> Life:
        """Make room for a request and begin to load."""
        if berth.failure is not None:
            raise _dead(berth, berth.failure)
        room = self.room_for(berth)
        if isinstance(room, NoRoom):
            refusal = f"{berth.name} cannot be loaded: {room.reason}"
            raise EngineBusy(refusal) if room.ever else EngineDead(refusal)
        self._send_away(room.leaving)
        return self._start(berth, announced=True)

    # --- memory -----------------------------------------------------------------------------------

    def _tenants(self) -> list[Tenant]:
        return [berth.tenant() for berth in self._berths.values()]

    def _measure(self, berth: Berth, *, fresh: bool = False) -> None:
        engine = None if berth.life is None else berth.life.engine
        size = None if engine is None else self._memory_of(engine)
        if size is not None:
            berth.measured(size, fresh=fresh, budget=self.config.budget)

    def _relieve(self) -> None:
        """Send idle models away if what is in memory turned out to be too much."""
        self._send_away(over_budget(self._tenants(), budget=self.config.budget))

    def _send_away(self, names: Iterable[str]) -> None:
        for name in names:
            life = self._berths[name].left()
            if life is not None:
                logger.info("%s leaves memory", name)
                self._leaving.add(life)
                life.leave.set()

    # --- lives ------------------------------------------------------------------------------------

    def _start(self, berth: Berth, *, announced: bool) -> Life:
        life = berth.life = Life(announced=announced)
        berth.failure = None
        self._line.append(berth)
        self._next_turn()
        self._nursery.start_soon(self._live, berth, life)
        return life

    def _next_turn(self) -> None:
        if self._line and (life := self._line[0].life) is not None:
            life.turn.set()

    async def _live(self, berth: Berth, life: Life) -> None:
        """Load a model, keep it until it is sent away, and end it."""
        await life.turn.wait()
        try:
            async with AsyncExitStack() as stack:
                try:
                    await self._load(berth, life, stack)
                finally:
                    life.settled.set()
                    self._line.remove(berth)
                    self._next_turn()
                if life.engine is not None:
                    await life.leave.wait()
        finally:
            self._leaving.discard(life)
            life.gone.set()

    async def _load(self, berth: Berth, life: Life, stack: AsyncExitStack) -> None:
        for other in tuple(self._leaving):
            await other.gone.wait()
        life.began = trio.current_time()
        logger.info("loading %s", berth.name)
        try:
            life.opened = await stack.enter_async_context(berth.model.open())
            await life.opened.wait_ready()
        except EngineError as exc:
            berth.failed(str(exc), first_pause_s=self.config.retry_pause_s)
            self._leaving.add(life)
            pause = berth.pause_s
            logger.warning("%s could not be loaded: %s; again in %.0f s", berth.name, exc, pause)
            self._nursery.start_soon(self._retry, berth)
            return
        berth.loaded(life.opened, now=trio.current_time())
        logger.info("%s is loaded", berth.name)
        self._measure(berth, fresh=True)
        self._relieve()

    async def _retry(self, berth: Berth) -> None:
        while berth.residence is Residence.FAILED:
            await trio.sleep(berth.pause_s)
            if self.begin_quietly(berth):
                return


@asynccontextmanager
async def open_fleet(
    models: Sequence[FleetModel],
    config: FleetConfig,
    *,
    memory_of: MemoryOf = lambda _: None,
) -> AsyncIterator[Fleet]:
    """A fleet that is loading as many of its models as fit, in the order given.

    Leaving the context ends every engine, and with it whatever still runs.
    """
    async with trio.open_nursery() as nursery:
        fleet = Fleet(models, config, nursery, memory_of=memory_of)
        fleet.preload()
        yield fleet
        nursery.cancel_scope.cancel()


def _dead(berth: Berth, reason: str) -> EngineDead:
    return EngineDead(f"{berth.name} could not be loaded: {reason}")


def _left(deadline_ms: int | None, *, since: float) -> int | None:
    """What is left of a request's time, a millisecond at least."""
    if deadline_ms is None:
        return None
    return max(1, deadline_ms - round(1000 * (trio.current_time() - since)))
