"""Whole NanoX, rounded up once; and the tree that commits to a list."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.protocol.ids import MAX_SAFE_INTEGER, MILLION
from pinaivu_node.protocol.merkle import tree_root
from pinaivu_node.protocol.money import ZERO_USAGE, PriceList, TokenUsage, cost

counts = st.integers(0, 10**8)
nanox = st.integers(0, 10**12)
usages = st.builds(TokenUsage, input=counts, cached_input=counts, output=counts)
price_lists = st.builds(PriceList, input=nanox, cached_input=nanox, output=nanox)

KINDS = ("input", "cached_input", "output")


@given(usages, price_lists, st.integers(0, 10**9))
def test_a_cost_is_the_exact_one_rounded_up_once(
    usage: TokenUsage, prices: PriceList, uplift: int
) -> None:
    exact = (
        Fraction(usage.input * prices.input, MILLION)
        + Fraction(usage.cached_input * prices.cached_input, MILLION)
        + Fraction(usage.output * prices.output, MILLION)
    ) * (1 + Fraction(uplift, MILLION))
    assert cost(usage, prices, uplift_ppm=uplift) == min(ceil(exact), MAX_SAFE_INTEGER)


@given(price_lists, st.integers(0, 10**9))
def test_nothing_used_costs_nothing(prices: PriceList, uplift: int) -> None:
    assert cost(ZERO_USAGE, prices, uplift_ppm=uplift) == 0


@given(usages, price_lists, st.integers(0, 10**9))
def test_an_uplift_never_makes_it_cheaper(
    usage: TokenUsage, prices: PriceList, uplift: int
) -> None:
    assert cost(usage, prices, uplift_ppm=uplift) >= cost(usage, prices)


@given(usages, usages, price_lists, price_lists)
def test_more_tokens_or_higher_prices_never_cost_less(
    usage: TokenUsage, more: TokenUsage, prices: PriceList, raise_by: PriceList
) -> None:
    more_usage = TokenUsage(
        **{kind: min(10**8, getattr(usage, kind) + getattr(more, kind)) for kind in KINDS}
    )
    higher = PriceList(**{kind: getattr(prices, kind) + getattr(raise_by, kind) for kind in KINDS})
    assert cost(usage, prices) <= cost(more_usage, prices) <= cost(more_usage, higher)
    assert prices.is_within(higher)


@given(usages, usages, price_lists)
def test_splitting_a_job_never_saves_and_costs_one_nanox_at_most(
    usage: TokenUsage, rest: TokenUsage, prices: PriceList
) -> None:
    whole = TokenUsage.model_construct(
        **{kind: getattr(usage, kind) + getattr(rest, kind) for kind in KINDS}
    )
    parts = cost(usage, prices) + cost(rest, prices)
    assert cost(whole, prices) <= parts <= cost(whole, prices) + 1


def test_no_cost_is_more_than_javascript_can_count() -> None:
    most = PriceList(input=MAX_SAFE_INTEGER, cached_input=MAX_SAFE_INTEGER, output=MAX_SAFE_INTEGER)
    usage = TokenUsage(input=10**8, cached_input=10**8, output=10**8)
    assert cost(usage, most, uplift_ppm=10**12) == MAX_SAFE_INTEGER


def rfc_9162_tree_hash(leaves: list[bytes]) -> bytes:
    """RFC 9162 §2.1.1, word for word."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    left, right = rfc_9162_tree_hash(leaves[:k]), rfc_9162_tree_hash(leaves[k:])
    return hashlib.sha256(b"\1" + left + right).digest()


@given(st.lists(st.binary(max_size=8), max_size=70))
def test_the_root_is_that_of_the_rfc(leaves: list[bytes]) -> None:
    assert tree_root(leaves) == "sha256:" + rfc_9162_tree_hash(leaves).hex()
