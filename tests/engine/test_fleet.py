"""Several models and too little memory, under a virtual clock."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from pinaivu_node.engine.fleet.berth import FleetModel
from pinaivu_node.engine.fleet.fleet import FleetConfig, open_fleet
from pinaivu_node.engine.fleet.residency import Residence
from pinaivu_node.engine.synthetic import SyntheticEngine
from pinaivu_node.engine.types import (
    EmbeddingRequest,
    Embeddings,
    EngineBusy,
    EngineDead,
    GenerationRequest,
    SamplingParams,
)

COLD, LOADING, WARM, FAILED = Residence.COLD, Residence.LOADING, Residence.WARM, Residence.FAILED


class SlowLoader(SyntheticEngine):
    """An engine that takes its time to come up, and may fail to."""

    def __init__(self, disk, name) -> None:
        super().__init__(tokens_per_second=10, ttft_ms=100, capacity=4)
        self._disk, self._name = disk, name
        self._began = trio.current_time()
        self._loaded = False

    async def wait_ready(self) -> None:
        await trio.sleep(self._began + self._disk.load_s - trio.current_time())
        if self._name in self._disk.broken:
            raise EngineDead("the weights are damaged")
        self._loaded = True

    async def embed(self, request) -> Embeddings:
        await trio.sleep(0.1)
        return Embeddings(((1.0,),) * len(request.inputs), len(request.inputs))

    def statistics(self):
        said = super().statistics()
        if self._loaded or not self._disk.tells_progress:
            return replace(said, ready=self._loaded)
        done = (trio.current_time() - self._began) / self._disk.load_s
        return replace(said, ready=False, load_progress=done)


class Disk:
    """Where models are loaded from, and what is in memory: it sees every breach of the budget."""

    def __init__(self, needs) -> None:
        self.needs = needs
        self.load_s = 4.0
        self.tells_progress = True
        self.broken = set()
        self.resident = {}
        self.loads = []
        self.most = 0
        self.loading = 0

    def models(self, **fields):
        return [
            FleetModel(name, self.opener(name), need=need, load_s=8.0, context_window=512, **fields)
            for name, need in self.needs.items()
        ]

    def opener(self, name):
        @asynccontextmanager
        async def open_engine():
            assert name not in self.resident
            self.loads.append(name)
            self.resident[name] = self.needs[name]
            self.most = max(self.most, sum(self.resident.values()))
            try:
                yield SlowLoader(self, name)
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.05)  # a process takes a moment to die
            finally:
                del self.resident[name]

        return open_engine


def request(name="r", *, tokens=5, deadline_ms=None):
    return GenerationRequest(name, "hello", SamplingParams(tokens), deadline_ms=deadline_ms)


async def answer(engine, **fields):
    async with engine.generate(request(**fields)) as events:
        return [event async for event in events]


@pytest.fixture
def disk():
    return Disk({"a": 10, "b": 10, "c": 10})


@asynccontextmanager
async def fleet_of(disk, *, budget=20, memory_of=lambda _: None, spare=0, **settings):
    config = FleetConfig(budget=budget, **settings)
    async with open_fleet(disk.models(spare=spare), config, memory_of=memory_of) as fleet:
        yield fleet, fleet.engines


def residences(engines):
    return {name: engine.standing().residence for name, engine in engines.items()}


async def settle(engines):
    for engine in engines.values():
        await engine.wait_ready()


async def test_the_first_that_fit_are_loaded_at_the_start_one_after_the_other(autojump_clock, disk):
    async with fleet_of(disk) as (_, engines):
        assert residences(engines) == {"a": LOADING, "b": LOADING, "c": COLD}
        await trio.sleep(3)
        assert disk.loads == ["a"]
        assert engines["a"].statistics().load_progress == 0.75
        assert not engines["a"].statistics().ready
        await settle(engines)
        assert trio.current_time() == pytest.approx(8)
        assert residences(engines) == {"a": WARM, "b": WARM, "c": COLD}
        assert engines["a"].statistics().ready
        assert disk.loads == ["a", "b"]
    assert not disk.resident


async def test_a_cold_model_is_loaded_when_it_is_asked_and_the_oldest_leaves(autojump_clock, disk):
    async with fleet_of(disk) as (_, engines):
        await settle(engines)
        await answer(engines["a"])
        asked = trio.current_time()
        events = await answer(engines["c"])
        assert len(events) == 5
        assert trio.current_time() - asked == pytest.approx(4.05 + 0.5, abs=0.2)
        assert residences(engines) == {"a": WARM, "b": COLD, "c": WARM}
        assert disk.most == 20


async def test_what_a_cold_model_says_of_its_first_token_comes_true(autojump_clock, disk):
    async with fleet_of(disk, budget=10) as (_, engines):
        await settle(engines)
        assert engines["c"].statistics().ttft_estimate_ms == 8000, "never loaded: an estimate"
        await answer(engines["c"])
        await answer(engines["a"])
        said = engines["c"].statistics()
        assert said.ready
        asked = trio.current_time()
        async with engines["c"].generate(request()) as events:
            await anext(aiter(events))
        took = 1000 * (trio.current_time() - asked)
        assert said.ttft_estimate_ms == pytest.approx(took, rel=0.05)
        assert said.context_window == 8192
        assert said.capacity == 4


@pytest.mark.parametrize("tells_progress", [True, False])
async def test_while_it_is_loaded_the_wait_that_is_said_shrinks(
    autojump_clock, disk, tells_progress
):
    disk.tells_progress = tells_progress
    async with fleet_of(disk, budget=10) as (_, engines), trio.open_nursery() as nursery:
        await settle(engines)
        await answer(engines["b"])
        await answer(engines["a"])
        nursery.start_soon(answer, engines["b"])
        await trio.sleep(1.05)
        one = engines["b"].standing()
        await trio.sleep(2)
        three = engines["b"].standing()
        assert one.residence is three.residence is LOADING
        assert one.delay_ms == pytest.approx(3000, abs=100)
        assert three.delay_ms == pytest.approx(1000, abs=100)
        assert three.progress == (pytest.approx(0.75) if tells_progress else 0.0)


async def test_what_was_running_when_a_model_left_does_not_count_when_it_comes_back(
    autojump_clock, disk
):
    async with fleet_of(disk, budget=10) as (_, engines), trio.open_nursery() as nursery:
        await settle(engines)
        for number in range(4):  # as many as run at once: another one would wait
            nursery.start_soon(lambda n: answer(engines["a"], name=f"r{n}"), number)
        await trio.sleep(0.3)
        busy = engines["a"].statistics().ttft_estimate_ms
        await trio.sleep(10)
        await answer(engines["b"])
        assert engines["a"].statistics().ttft_estimate_ms < 4000 + min(busy, 200)


async def test_a_model_at_work_is_not_sent_away(autojump_clock, disk):
    async with fleet_of(disk, budget=10) as (_, engines):
        await settle(engines)
        async with engines["a"].generate(request(tokens=50)) as events:
            standing = engines["b"].standing()
            assert not standing.has_room
            assert standing.reason == "no memory for it while a is in use"
            assert engines["b"].statistics().ready, "it is for sale all the same, only not now"
            with pytest.raises(EngineBusy, match="b cannot be loaded: no memory for it while a"):
                await answer(engines["b"])
            assert len([event async for event in events]) == 50
        await answer(engines["b"])
        assert disk.most == 10


async def test_a_model_that_is_waited_for_serves_those_who_wait_before_it_leaves(
    autojump_clock, disk
):
    async with fleet_of(disk, budget=10) as (_, engines), trio.open_nursery() as nursery:
        await settle(engines)
        served = []

        async def ask(name):
            await answer(engines["b"], name=name)
            served.append(name)

        for number in range(3):
            nursery.start_soon(ask, f"b{number}")
        await trio.sleep(0.01)
        with pytest.raises(EngineBusy, match="while b is in use"):
            await answer(engines["c"])
        await trio.sleep(20)
        assert len(served) == 3
        await answer(engines["c"])
        assert disk.loads == ["a", "b", "c"]


async def test_only_so_many_wait_for_one_load(autojump_clock, disk):
    async with fleet_of(disk, budget=10, max_waiting=2) as (_, engines):
        await settle(engines)
        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(lambda n: answer(engines["b"], name=f"b{n}"), number)
            await trio.sleep(1)
            assert engines["b"].statistics().queued == 2
            assert not engines["b"].standing().has_room
            with pytest.raises(EngineBusy, match="2 requests wait for b to be loaded"):
                await answer(engines["b"])


async def test_nobody_waits_longer_than_the_deadline_and_the_load_goes_on(autojump_clock, disk):
    async with fleet_of(disk, budget=10) as (_, engines):
        await settle(engines)
        with pytest.raises(EngineBusy, match=r"b is still being loaded \(\d+%\)"):
            await answer(engines["b"], deadline_ms=2000)
        await engines["b"].wait_ready()
        assert residences(engines)["b"] is WARM


async def test_the_time_spent_on_loading_is_taken_from_the_deadline(autojump_clock, disk):
    heard = []

    class Listening(SlowLoader):
        def generate(self, request):
            heard.append(request.deadline_ms)
            return super().generate(request)

    @asynccontextmanager
    async def open_engine():
        yield Listening(disk, "x")

    async with open_fleet([FleetModel("x", open_engine, need=1)], FleetConfig(budget=1)) as fleet:
        await answer(fleet.engines["x"], deadline_ms=10_000)
        await answer(fleet.engines["x"], deadline_ms=10_000)
        await answer(fleet.engines["x"])
    assert heard == [6000, 10_000, None]


async def test_one_who_gives_up_waiting_does_not_stop_the_load(autojump_clock, disk):
    async with fleet_of(disk, budget=10) as (_, engines):
        await settle(engines)
        with trio.move_on_after(1):
            await answer(engines["b"])
        await engines["b"].wait_ready()
        assert residences(engines)["b"] is WARM
        await answer(engines["c"])
        assert residences(engines)["b"] is COLD


async def test_a_model_that_fails_to_load_is_not_for_sale_and_is_tried_again(autojump_clock, disk):
    disk.broken.add("b")
    async with fleet_of(disk, retry_pause_s=30) as (_, engines):
        await engines["a"].wait_ready()
        with pytest.raises(EngineDead, match="b could not be loaded: the weights are damaged"):
            await engines["b"].wait_ready()
        standing = engines["b"].standing()
        assert (standing.residence, standing.reason) == (FAILED, "the weights are damaged")
        assert not engines["b"].statistics().ready
        with pytest.raises(EngineDead, match="the weights are damaged"):
            await answer(engines["b"])
        await trio.sleep(1)
        assert "b" not in disk.resident
        await trio.sleep(32)
        assert residences(engines)["b"] is LOADING
        assert not engines["b"].statistics().ready, "it has to prove itself first"
        await trio.sleep(40)
        assert disk.loads.count("b") == 2, "the pause grows"
        disk.broken.clear()
        await trio.sleep(40)
        assert residences(engines)["b"] is WARM
        assert engines["b"].statistics().ready


async def test_those_who_wait_for_a_model_that_fails_are_told_why(autojump_clock, disk):
    disk.broken.add("c")
    async with fleet_of(disk) as (_, engines), trio.open_nursery() as nursery:
        await settle(engines)
        refused = []

        async def ask(name):
            with pytest.raises(EngineDead, match="c could not be loaded: the weights are damaged"):
                await answer(engines["c"], name=name)
            refused.append(name)

        for number in range(3):
            nursery.start_soon(ask, f"r{number}")
        await trio.sleep(10)
        assert len(refused) == 3
        assert len(disk.resident) == 1


async def test_a_retry_does_not_displace_a_model_in_use(autojump_clock, disk):
    disk.broken.add("c")
    async with fleet_of(disk, budget=10, retry_pause_s=5, settled_s=60) as (_, engines):
        await settle({"a": engines["a"]})
        with pytest.raises(EngineDead):
            await answer(engines["c"])
        disk.broken.clear()
        for _ in range(10):
            await answer(engines["a"])
            await trio.sleep(10)
        assert disk.loads.count("c") == 1
        await trio.sleep(70)
        assert residences(engines)["c"] is WARM


async def test_a_wish_that_came_too_late_warms_the_model_for_the_next_one(autojump_clock, disk):
    async with fleet_of(disk, budget=10, settled_s=60) as (_, engines):
        await settle(engines)
        engines["b"].anticipate()
        assert residences(engines)["b"] is COLD, "the other one was just loaded"
        await trio.sleep(61)
        engines["b"].anticipate()
        engines["b"].anticipate()
        await engines["b"].wait_ready()
        assert residences(engines) == {"a": COLD, "b": WARM, "c": COLD}


async def test_what_is_measured_corrects_what_was_estimated(autojump_clock, disk):
    async with fleet_of(disk, budget=25, spare=1, memory_of=lambda _: 6) as (_, engines):
        await settle(engines)
        assert residences(engines)["c"] is COLD
        await answer(engines["c"])
        assert set(residences(engines).values()) == {WARM}, "7 each: all three fit"


async def test_what_a_model_has_not_touched_does_not_make_it_too_large(autojump_clock, disk):
    async with fleet_of(disk, budget=10, spare=5, memory_of=lambda _: 8) as (_, engines):
        await settle(engines)
        for name in "abab":
            await answer(engines[name])
        assert disk.most == 10


async def test_a_model_that_takes_more_than_there_may_be_leaves_for_good(autojump_clock, disk):
    async with fleet_of(disk, budget=10, memory_of=lambda _: 11) as (_, engines):
        await answer(engines["a"])
        with pytest.raises(EngineDead, match="a cannot be loaded: it needs"):
            await answer(engines["a"])
        assert not engines["a"].statistics().ready


async def test_a_model_that_grew_makes_the_idle_leave_when_it_is_done(autojump_clock, disk):
    sizes = {}
    async with fleet_of(disk, memory_of=lambda engine: sizes.get(engine._name)) as (_, engines):
        await settle(engines)
        sizes["b"] = 15
        async with engines["b"].generate(request()) as events:
            assert residences(engines)["a"] is WARM
            async for _ in events:
                pass
        assert residences(engines) == {"a": COLD, "b": WARM, "c": COLD}


async def test_counters_go_on_when_a_model_comes_back(autojump_clock, disk):
    async with fleet_of(disk, budget=10) as (_, engines):
        for _ in range(3):
            await answer(engines["a"], deadline_ms=60_000)
            assert engines["a"].statistics().generated_tokens % 5 == 0
            await answer(engines["b"])
        assert engines["a"].statistics().generated_tokens == 15
        await answer(engines["a"])
        assert engines["a"].statistics().generated_tokens == 20


async def test_embeddings_load_the_model_too(autojump_clock, disk):
    async with fleet_of(disk, budget=10) as (_, engines):
        await settle(engines)
        said = await engines["b"].embed(EmbeddingRequest("e", ("one", "two"), deadline_ms=9000))
        assert said.input_tokens == 2


async def test_a_model_that_can_never_fit_is_not_for_sale(autojump_clock, disk):
    disk.needs["c"] = 30
    async with fleet_of(disk) as (_, engines):
        assert not engines["c"].statistics().ready
        assert "the budget is" in engines["c"].standing().reason
        with pytest.raises(EngineDead, match="c cannot be loaded: it needs"):
            await answer(engines["c"])


async def test_leaving_the_fleet_ends_everything_in_the_middle_of_a_load(autojump_clock, disk):
    async with fleet_of(disk):
        await trio.sleep(5)
    assert not disk.resident


@pytest.mark.parametrize("seed", range(8))
async def test_a_busy_day_breaks_no_rule_and_starves_nobody(autojump_clock, seed):
    dice = random.Random(seed)
    disk = Disk({name: dice.randint(4, 12) for name in "abcdef"})
    served, refused = dict.fromkeys(disk.needs, 0), 0
    async with fleet_of(disk, budget=24, settled_s=5) as (_, engines):

        async def customer(number):
            nonlocal refused
            name = dice.choice(list(engines))
            await trio.sleep(dice.uniform(0, 2000))
            try:
                await answer(engines[name], name=f"r{number}", tokens=dice.randint(1, 80))
            except EngineBusy:
                refused += 1
            else:
                served[name] += 1

        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(customer, number)
        assert sum(served.values()) + refused == 300
        assert min(served.values()) >= 20
        assert disk.most <= 24
        busy = [name for name in engines if engines[name].statistics().running]
        assert not busy
