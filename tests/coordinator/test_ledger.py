from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from market_town import request_id, signer_of

from pinaivu_node.coordinator.ledger import (
    TREASURY,
    Entry,
    OverdraftError,
    Posting,
    Share,
    deposit_entry,
    gateway_account,
    hold_account,
    hold_entry,
    posted,
    settle_entry,
    welcome_entry,
)
from pinaivu_node.protocol.errors import LocalProtocolError
from pinaivu_node.protocol.ids import MAX_SAFE_INTEGER

GATEWAYS = [signer_of(f"gateway {n}").peer_id for n in range(2)]
PROVIDERS = [signer_of(f"provider {n}").peer_id for n in range(3)]


def test_an_entry_that_loses_or_invents_money_cannot_be_written():
    with pytest.raises(LocalProtocolError):
        Entry("x", (Posting("a", 1),))
    with pytest.raises(LocalProtocolError):
        Entry("x", (Posting("a", 1), Posting("a", -1)))
    Entry("nothing moves", ())


def test_a_bill_above_its_hold_is_our_bug():
    share = Share(PROVIDERS[0], 11, 1)
    with pytest.raises(LocalProtocolError):
        settle_entry(GATEWAYS[0], request_id(), hold=10, shares=[share])


def test_a_settlement_captures_and_releases_in_one_entry():
    shares = [Share(PROVIDERS[0], 50, 1), Share(PROVIDERS[1], 20, 0)]
    entry = settle_entry(GATEWAYS[0], request_id(), hold=100, shares=shares)
    assert {posting.account: posting.amount for posting in entry.postings} == {
        hold_account(request_id()): -100,
        gateway_account(GATEWAYS[0]): 30,
        "fee": 1,
        f"provider:{PROVIDERS[0]}": 49,
        f"provider:{PROVIDERS[1]}": 20,
    }


def test_only_the_treasury_may_owe():
    entry = hold_entry(GATEWAYS[0], request_id(), 10)
    with pytest.raises(OverdraftError) as caught:
        posted({gateway_account(GATEWAYS[0]): 9}, entry)
    assert (caught.value.balance, caught.value.needed) == (9, 10)
    assert posted({}, deposit_entry(GATEWAYS[0], 5, key="a"))[TREASURY] == -5


def test_no_balance_leaves_what_a_reader_can_represent():
    with pytest.raises(LocalProtocolError):
        posted({TREASURY: -MAX_SAFE_INTEGER}, deposit_entry(GATEWAYS[0], 1, key="a"))


class Bookkeeping(RuleBasedStateMachine):
    """A ledger as the store keeps one, in memory; every rule may be repeated at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.balances: dict[str, int] = {}
        self.keys: set[str] = set()
        self.holds: dict[int, tuple[str, int]] = {}

    def post(self, entry: Entry) -> bool:
        if entry.key in self.keys:
            return False
        self.balances |= posted(self.balances, entry)
        self.keys.add(entry.key)
        return True

    @rule(gateway=st.sampled_from(GATEWAYS), amount=st.integers(0, 1000), key=st.integers(0, 9))
    def deposit(self, gateway, amount, key):
        self.post(deposit_entry(gateway, amount, key=str(key)))

    @rule(gateway=st.sampled_from(GATEWAYS), amount=st.integers(0, 1000))
    def welcome(self, gateway, amount):
        self.post(welcome_entry(gateway, amount))

    @rule(gateway=st.sampled_from(GATEWAYS), job=st.integers(0, 9), amount=st.integers(0, 500))
    def hold(self, gateway, job, amount):
        before = dict(self.balances)
        try:
            if self.post(hold_entry(gateway, request_id(job), amount)):
                self.holds[job] = (gateway, amount)
        except OverdraftError:
            assert self.balances == before

    @rule(job=st.integers(0, 9), parts=st.lists(st.integers(0, 500), max_size=3), fee=st.integers())
    def settle(self, job, parts, fee):
        if job not in self.holds:
            return
        gateway, hold = self.holds[job]
        shares, left = [], hold
        for provider, part in zip(PROVIDERS, parts, strict=False):
            amount = min(part, left)
            left -= amount
            shares.append(Share(provider, amount, fee % (amount + 1)))
        self.post(settle_entry(gateway, request_id(job), hold=hold, shares=shares))
        assert self.balances.get(hold_account(request_id(job)), 0) == 0

    @invariant()
    def the_sum_is_zero(self):
        assert sum(self.balances.values()) == 0

    @invariant()
    def nobody_but_the_treasury_owes(self):
        assert all(n >= 0 for account, n in self.balances.items() if account != TREASURY)


TestBookkeeping = Bookkeeping.TestCase
