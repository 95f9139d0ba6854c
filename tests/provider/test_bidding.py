from __future__ import annotations

import dataclasses

import pytest

from pinaivu_node.protocol.draw import EVERYONE, draw
from pinaivu_node.protocol.ids import digest_of
from pinaivu_node.protocol.market import Bid, JobKind, Pass, PassReason
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.provider.bidding import Seller, answer_offer
from pinaivu_node.provider.seen import SeenRequests


@pytest.fixture
def seller(facts):
    def made(*, stock=None, **changes):
        fields = {
            "me": facts.provider.peer_id,
            "stock": facts.stock() if stock is None else stock,
            "draining": False,
            "price_ceiling": None,
            "answered": frozenset(),
            "bid_validity": 10_000,
        }
        return Seller(**(fields | changes))

    return made


def test_a_free_provider_bids_its_list_prices(facts, seller):
    offer = facts.offer()
    bid = answer_offer(offer, seller(), now=facts.epoch)
    assert bid == Bid(
        request_id=offer.terms.request_id,
        bidder=facts.provider.peer_id,
        model_digest=facts.weights,
        prices=facts.prices,
        context_window=8192,
        warm_tokens=0,
        expires_at=offer.closes_at + 10_000,
    )


CHEAP = PriceList(input=50_000_000, cached_input=10_000_000, output=199_999_999)


@pytest.mark.parametrize(
    ("reason", "terms", "stock"),
    [
        (PassReason.NOT_SERVED, {"model": "another:1b"}, {}),
        (PassReason.NOT_SERVED, {"model_digest": digest_of(b"other")}, {}),
        (PassReason.NOT_SERVED, {}, {"kinds": (JobKind.COMPLETION,)}),
        (PassReason.ENGINE_UNAVAILABLE, {}, {"ready": False}),
        (PassReason.CONTEXT_TOO_SMALL, {"input_estimate": 8000, "output_limit": 193}, {}),
        (PassReason.PRICE_TOO_LOW, {"max_prices": CHEAP}, {}),
        (PassReason.FULL, {}, {"running": 4}),
        (PassReason.FULL, {}, {"running": 7}),
    ],
)
def test_a_pass_says_why(facts, seller, reason, terms, stock):
    offer = facts.offer(**terms)
    answer = answer_offer(offer, seller(stock=facts.stock(**stock)), now=facts.epoch)
    assert isinstance(answer, Pass)
    assert answer.reason is reason


def test_a_draining_provider_passes(facts, seller):
    answer = answer_offer(facts.offer(), seller(draining=True), now=facts.epoch)
    assert answer.reason is PassReason.DRAINING


def test_the_networks_ceiling_holds_where_the_client_names_none(facts, seller):
    cautious = seller(price_ceiling=CHEAP)
    assert answer_offer(facts.offer(), cautious, now=facts.epoch).reason is PassReason.PRICE_TOO_LOW
    generous = facts.offer(max_prices=facts.prices)
    assert isinstance(answer_offer(generous, cautious, now=facts.epoch), Bid)


def test_the_last_token_of_the_window_may_be_asked_for(facts, seller):
    offer = facts.offer(input_estimate=8000, output_limit=192)
    assert isinstance(answer_offer(offer, seller(), now=facts.epoch), Bid)


def test_a_closed_offer_is_not_answered(facts, seller):
    offer = facts.offer()
    assert answer_offer(offer, seller(), now=offer.closes_at) is None


def test_an_offer_past_its_deadline_is_not_answered(facts, seller):
    offer = facts.offer(deadline=facts.epoch)
    assert answer_offer(offer, seller(), now=facts.epoch) is None


def test_an_offer_is_answered_once(facts, seller):
    offer = facts.offer()
    again = seller(answered={offer.terms.request_id})
    assert answer_offer(offer, again, now=facts.epoch) is None


def test_only_those_drawn_below_the_threshold_answer(facts, seller):
    for _ in range(50):
        request_id = facts.request_id()
        number = draw(facts.provider.peer_id, request_id)
        out = facts.offer(request_id=request_id, threshold=number)
        within = facts.offer(request_id=request_id, threshold=number + 1)
        assert number < EVERYONE
        assert answer_offer(out, seller(), now=facts.epoch) is None
        assert answer_offer(within, seller(), now=facts.epoch) is not None


def test_not_even_a_pass_comes_from_one_who_is_not_asked(facts, seller):
    full = seller(stock=facts.stock(running=4))
    assert answer_offer(facts.offer(threshold=0), full, now=facts.epoch) is None


def test_a_seller_cannot_be_changed(seller):
    with pytest.raises(dataclasses.FrozenInstanceError):
        seller().draining = True


def test_the_seen_set_forgets_only_what_could_not_pass_again(facts):
    seen = SeenRequests(2)
    one, two, three = (facts.request_id() for _ in range(3))
    assert seen.add(one, until=10, now=0)
    assert seen.add(two, until=20, now=0)
    assert not seen.add(three, until=30, now=9)
    assert three not in seen
    assert seen.add(three, until=30, now=10)
    assert one not in seen
    assert two in seen
    assert len(seen) == 2


def test_a_bid_says_how_much_of_the_prompt_is_warm(facts, seller):
    bid = answer_offer(facts.offer(), seller(warm_tokens=896), now=facts.epoch)
    assert bid.warm_tokens == 896
