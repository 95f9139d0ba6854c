from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pinaivu_node.engine.batching.blocks import BlockPool, next_name, root_name
from pinaivu_node.engine.batching.sequence import Sequence

SIZE = 4


def names(tokens, tenant=b"") -> list[bytes]:
    return Sequence(list(tokens), tenant=tenant).name_blocks(size=SIZE)


def test_the_name_of_a_block_says_everything_before_it():
    a, b = names(range(12)), names([99, *range(1, 12)])
    assert len(a) == len(b) == 3
    assert not set(a) & set(b)
    assert names(range(8)) == a[:2]
    assert names(range(11)) == a[:2]


def test_no_tenant_knows_the_names_of_another():
    assert not set(names(range(40), b"one")) & set(names(range(40), b"two"))


def test_tokens_and_their_split_cannot_be_confused():
    root = root_name(b"")
    assert next_name(root, [1, 2]) != next_name(root, [2, 1]) != next_name(root, [258])


def test_names_grow_with_the_sequence():
    sequence = Sequence(list(range(6)))
    assert len(sequence.name_blocks(size=SIZE)) == 1
    sequence.tokens += range(6, 12)
    assert sequence.name_blocks(size=SIZE) == names(range(12))


def test_what_was_used_longest_ago_is_given_up_first_and_of_it_the_end():
    pool = BlockPool(4, size=SIZE)
    old, new = names(range(8), b"old"), names(range(8), b"new")
    for time, chain in ((1.0, old), (2.0, new)):
        blocks = pool.take(2)
        for block, name in zip(blocks, chain, strict=True):
            pool.name(block, name)
        pool.release(blocks, now=time)
    assert pool.statistics(now=3.0).horizon_s == float("inf")
    pool.take(1)
    assert (pool.known(old), pool.known(new)) == (1, 2)
    assert pool.statistics(now=3.0).horizon_s == 2.0
    pool.take(1)
    assert (pool.known(old), pool.known(new)) == (0, 2)


def test_what_is_too_much_is_not_taken_in_part():
    pool = BlockPool(3, size=SIZE)
    assert pool.take(4) is None
    assert pool.available == 3


def test_a_block_whose_content_is_in_doubt_is_shared_with_nobody():
    pool = BlockPool(2, size=SIZE)
    (block,) = pool.take(1)
    (name,) = names(range(4))
    pool.name(block, name)
    pool.unname([block])
    assert pool.known([name]) == 0
    pool.release([block], now=1.0)
    assert pool.available == 2
    assert pool.statistics(now=1.0).kept == 0


class PoolMachine(RuleBasedStateMachine):
    """Any use of a pool: no block has two owners who did not share it, none is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7, size=SIZE)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.now = 0.0

    @rule(count=st.integers(0, 8))
    def take(self, count) -> None:
        blocks = self.pool.take(count)
        if blocks is not None:
            in_use = {block for each in self.held for block in each}
            assert not in_use & set(blocks)
            for block in blocks:
                self.content.pop(block, None)
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99), seed=st.integers(0, 3))
    def name(self, which, seed) -> None:
        blocks = self.held[which % len(self.held)]
        for block, name in zip(blocks, names(range(40), bytes([seed])), strict=False):
            before = self.pool.known([name])
            self.pool.name(block, name)
            if not before and self.pool.known([name]) and block not in self.content:
                self.content[block] = name

    @rule(seed=st.integers(0, 3))
    def share(self, seed) -> None:
        chain = names(range(40), bytes([seed]))
        blocks = self.pool.share(chain)
        assert [self.content.get(block) for block in blocks] == chain[: len(blocks)]
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def release(self, which) -> None:
        self.now += 1
        self.pool.release(self.held.pop(which % len(self.held)), now=self.now)

    @invariant()
    def nothing_is_lost(self) -> None:
        in_use = {block for each in self.held for block in each}
        assert self.pool.statistics(now=self.now).in_use == len(in_use)
        assert self.pool.available == 7 - len(in_use)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.integers(0, 2**31), max_size=40), st.binary(max_size=8))
def test_a_name_is_made_of_nothing_but_tenant_and_tokens(tokens, tenant):
    assert names(tokens, tenant) == names(list(tokens), tenant)
    assert len(names(tokens, tenant)) == len(tokens) // SIZE


@pytest.mark.parametrize("count", [1, 5])
def test_everything_forgotten_is_free_again(count):
    pool = BlockPool(count, size=SIZE)
    blocks = pool.take(count)
    for block, name in zip(blocks, names(range(SIZE * count)), strict=True):
        pool.name(block, name)
    pool.release(blocks, now=1.0)
    pool.forget()
    assert sorted(pool.take(count)) == list(range(count))
