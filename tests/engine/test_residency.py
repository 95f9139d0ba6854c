"""Who stays in memory: three rules, whatever is asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.engine.fleet.residency import (
    NoRoom,
    Residence,
    Room,
    Tenant,
    first_to_load,
    over_budget,
    room_for,
)

WARM, COLD, LOADING = Residence.WARM, Residence.COLD, Residence.LOADING
GB = 10**9


@st.composite
def households(draw):
    """Up to seven models in any state; the budget may be too small for what is resident."""
    count = draw(st.integers(1, 7))
    return [
        Tenant(
            name=f"model-{number}",
            need=draw(st.integers(1, 40)),
            residence=draw(st.sampled_from(Residence)),
            calls=draw(st.sampled_from([0, 0, 1, 3])),
            last_used=draw(st.integers(0, 5)),
        )
        for number in range(count)
    ]


def named(tenants, names):
    return [each for each in tenants if each.name in names]


def resident(tenants):
    return sum(each.need for each in tenants if each.resident)


@given(households(), st.integers(1, 120), st.data())
def test_a_model_gets_room_within_the_budget_and_nobody_at_work_gives_way(tenants, budget, data):
    wanted = data.draw(st.sampled_from([each for each in tenants if not each.resident] or tenants))
    others = [each for each in tenants if each.name != wanted.name]
    room = room_for(wanted.name, tenants, budget=budget)
    movable = [each for each in others if each.movable]
    if isinstance(room, NoRoom):
        least = resident(others) - sum(each.need for each in movable) + wanted.need
        assert least > budget
        assert room.ever == (wanted.need <= budget)
        return
    leaving = named(others, room.leaving)
    assert len(leaving) == len(room.leaving)
    assert all(each.residence is WARM and not each.calls for each in leaving)
    assert resident(others) - sum(each.need for each in leaving) + wanted.need <= budget


@given(households(), st.integers(1, 120), st.data())
def test_those_used_longest_ago_leave_and_no_more_than_needed(tenants, budget, data):
    wanted = data.draw(st.sampled_from(tenants))
    others = [each for each in tenants if each.name != wanted.name]
    room = room_for(wanted.name, tenants, budget=budget)
    if isinstance(room, NoRoom):
        return
    leaving = named(others, room.leaving)
    after = resident(others) - sum(each.need for each in leaving) + wanted.need
    assert all(after + each.need > budget for each in leaving), "one of them need not have left"
    before = resident(others) + wanted.need
    idle = sorted(
        (each for each in others if each.movable), key=lambda each: (each.last_used, each.name)
    )
    while idle and before - sum(each.need for each in idle[:-1]) <= budget:
        idle.pop()
    assert set(leaving) <= set(idle), "one left who was used after enough others"


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 2])), max_size=8))
def test_among_equals_it_is_exactly_the_oldest_idle_ones(uses):
    tenants = [
        Tenant(f"m{number}", 10, WARM, calls=calls, last_used=used)
        for number, (used, calls) in enumerate(uses)
    ]
    wanted = Tenant("wanted", 25, COLD)
    room = room_for("wanted", [*tenants, wanted], budget=10 * len(tenants) + 5)
    idle = sorted((each for each in tenants if not each.calls), key=lambda each: each.last_used)
    if len(idle) < 2:
        assert isinstance(room, NoRoom)
    else:
        oldest = [each.last_used for each in idle[:2]]
        assert [each.last_used for each in named(idle, room.leaving)] == oldest


@given(households(), st.integers(1, 120))
def test_when_needs_grew_the_idle_leave_until_it_fits_again(tenants, budget):
    leaving = named(tenants, over_budget(tenants, budget=budget))
    assert all(each.movable for each in leaving)
    rest = [each for each in tenants if each not in leaving]
    assert resident(rest) <= budget or not any(each.movable for each in rest)
    if resident(tenants) <= budget:
        assert not leaving


@given(households(), st.integers(1, 120))
def test_as_many_as_fit_are_loaded_at_the_start_in_the_order_given(tenants, budget):
    chosen = first_to_load(tenants, budget=budget)
    taken = 0
    for each in tenants:
        assert (each.name in chosen) == (taken + each.need <= budget)
        taken += each.need if each.name in chosen else 0
    assert taken <= budget


@given(households())
def test_without_a_budget_nobody_leaves(tenants):
    assert room_for(tenants[0].name, tenants, budget=None) == Room()
    assert over_budget(tenants, budget=None) == ()
    assert len(first_to_load(tenants, budget=None)) == len(tenants)


def test_a_small_model_stays_if_the_large_one_has_to_go_anyway():
    tenants = [
        Tenant("small", 2, WARM, last_used=1),
        Tenant("large", 10, WARM, last_used=2),
        Tenant("wanted", 10, COLD),
    ]
    assert room_for("wanted", tenants, budget=12) == Room(("large",))


def test_a_model_that_was_just_used_is_not_displaced_on_a_guess():
    tenants = [Tenant("a", 10, WARM, last_used=50), Tenant("b", 10, COLD)]
    assert isinstance(room_for("b", tenants, budget=15, idle_since=49), NoRoom)
    assert room_for("b", tenants, budget=15, idle_since=50) == Room(("a",))


def test_a_model_that_is_too_large_by_itself_is_told_so_for_good():
    room = room_for("giant", [Tenant("giant", 30 * GB, COLD)], budget=19 * GB)
    assert not room.ever
    assert room.reason == "it needs 30.0 GB of memory and the budget is 19.0 GB"


def test_one_that_outgrew_the_budget_leaves_and_not_its_neighbours():
    tenants = [Tenant("neighbour", 5, WARM, last_used=1), Tenant("giant", 20, WARM, last_used=9)]
    assert over_budget(tenants, budget=15) == ("giant",)


@pytest.mark.parametrize(("residence", "calls"), [(WARM, 1), (LOADING, 0), (LOADING, 2)])
def test_who_is_in_the_way_is_named(residence, calls):
    tenants = [
        Tenant("a", 10, residence, calls=calls),
        Tenant("idle", 5, WARM),
        Tenant("b", 10, COLD),
    ]
    assert room_for("b", tenants, budget=16) == NoRoom("no memory for it while a is in use")
