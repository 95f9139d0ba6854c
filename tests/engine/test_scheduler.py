from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_node.engine.batching.blocks import BlockPool
from pinaivu_node.engine.batching.scheduler import Fit, Scheduler
from pinaivu_node.engine.batching.sequence import Sequence

SIZE = 4


class Simulation:
    """A scheduler, and a cache that remembers which token was computed where."""

    def __init__(self, *, blocks: int = 8, max_running: int = 4) -> None:
        self.pool = BlockPool(blocks, size=SIZE)
        self.scheduler = Scheduler(self.pool, max_running=max_running)
        self.cache: dict[tuple[int, int], tuple[int, int]] = {}
        self.now = 0.0

    def add(self, tokens, tenant=b"") -> Sequence:
        sequence = Sequence(list(tokens), tenant=tenant)
        self.scheduler.add(sequence)
        return sequence

    def step(self, budget: int = 100) -> list[Sequence]:
        """Make a step; every sequence that draws gets the token 7·n."""
        self.now += 1
        plan = self.scheduler.plan(prefill_tokens=budget, now=self.now)
        assert plan.prefill_tokens <= budget
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks)
        for number, chunk in enumerate(plan.chunks):
            sequence = chunk.sequence
            assert chunk.count == 1 or number >= plan.decoding
            assert chunk.start == sequence.computed
            assert len(sequence.blocks) * SIZE >= chunk.start + chunk.count
            for position in range(chunk.start, chunk.start + chunk.count):
                place = sequence.blocks[position // SIZE], position % SIZE
                self.cache[place] = (position, sequence.tokens[position])
            # Whatever this chunk attends to is there: computed by it, or shared.
            for position in range(chunk.start + chunk.count):
                place = sequence.blocks[position // SIZE], position % SIZE
                assert self.cache[place] == (position, sequence.tokens[position])
        self.scheduler.computed(plan)
        drawn = [chunk.sequence for chunk in plan.chunks if chunk.rows]
        for sequence in drawn:
            sequence.tokens.append(7 * len(sequence.tokens))
        return drawn

    def leave(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence, now=self.now)


def test_a_long_prompt_is_computed_beside_those_who_stream():
    sim = Simulation(blocks=20)
    streaming = sim.add([1, 2])
    sim.step()
    long = sim.add(range(100, 130))
    for _ in range(3):
        assert sim.step(budget=8) == [streaming]
    assert sim.step(budget=8) == [streaming, long]
    assert long.computed == 30


def test_prompts_are_served_in_order_of_arrival():
    sim = Simulation(blocks=20)
    first, second = sim.add(range(6)), sim.add(range(50, 56))
    assert sim.step(budget=6) == [first]
    assert sim.step(budget=6) == [first, second]


def test_a_prefix_that_is_known_is_not_computed_again():
    sim = Simulation(blocks=20)
    first = sim.add(range(10))
    sim.step()
    sim.leave(first)
    again, other = sim.add(range(10)), sim.add(range(10), tenant=b"other")
    sim.step()
    assert (again.cached, other.cached) == (8, 0)


def test_the_last_token_is_computed_even_if_it_is_known():
    sim = Simulation(blocks=20)
    first = sim.add(range(8))
    sim.step()
    sim.leave(first)
    again = sim.add(range(8))
    assert sim.step() == [again]
    assert again.cached == 4


def test_one_waits_for_a_prefix_that_another_is_computing():
    sim = Simulation(blocks=20)
    first, second, other = sim.add(range(9)), sim.add(range(9)), sim.add([5, 6])
    assert sim.step(budget=6) == [other] or sim.scheduler.running[0] is first
    while second.computed == 0:
        sim.step(budget=6)
    assert second.cached == 8
    assert first.blocks[:2] == second.blocks[:2]


def test_the_one_that_joined_last_gives_way_and_comes_back():
    sim = Simulation(blocks=5)
    first, second = sim.add([1] * 7), sim.add([2] * 7)
    while sim.scheduler.preemptions == 0:
        sim.step()
    assert sim.scheduler.running == [first]
    assert list(sim.scheduler.waiting) == [second]
    assert second.cached == 0
    before = len(second.tokens)
    sim.leave(first)
    sim.step()
    assert len(second.tokens) == before + 1
    assert second.cached == 0


def test_what_never_fits_is_told_from_what_fits_later():
    sim = Simulation(blocks=4, max_running=1)
    assert sim.scheduler.fits(15) is Fit.NOW
    assert sim.scheduler.fits(16) is Fit.NEVER
    sim.add([1] * 3)
    sim.step()
    assert sim.scheduler.fits(3) is Fit.LATER


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_whoever_asks_is_answered_whatever_the_others_do(seed):
    """Every sequence is finished in the end, with its own tokens in the cache all the while."""
    rng = random.Random(seed)
    sim = Simulation(blocks=rng.randint(6, 12), max_running=rng.randint(1, 5))
    goals: dict[Sequence, int] = {}
    texts = [[rng.randrange(3) for _ in range(12)] for _ in range(3)]
    asked = 0
    for _ in range(600):
        if asked < 12 and rng.random() < 0.3:
            prompt = rng.choice(texts)[: rng.randint(1, 12)]
            sequence = sim.add(prompt, tenant=bytes([rng.randrange(2)]))
            goals[sequence] = len(prompt) + rng.randint(1, 10)
            asked += 1
        if goals and rng.random() < 0.02:
            sequence = rng.choice(list(goals))
            sim.leave(sequence)
            del goals[sequence]
        sim.step(budget=rng.randint(1, 9))
        for sequence in [s for s, goal in goals.items() if len(s.tokens) >= goal]:
            sim.leave(sequence)
            del goals[sequence]
        if asked == 12 and not goals:
            break
    assert not goals
    assert sim.pool.statistics(now=sim.now).in_use == 0
