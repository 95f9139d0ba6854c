"""To bid or to pass: what one offer is answered, decided from what is known at that moment.

Pure.  An offer that must not be answered at all gets None: it closed, we answered it before, or
its threshold leaves us out.  Everything else is answered, because the auction closes as soon as
everybody has spoken: a quick Pass saves every client the wait.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from pinaivu_node.protocol.draw import draw
from pinaivu_node.protocol.ids import (
    Milliseconds,
    ModelName,
    PeerId,
    RequestId,
    UnixMilliseconds,
)
from pinaivu_node.protocol.market import NO_DELAY, Bid, JobOffer, JobTerms, Pass, PassReason
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.provider.shelf import Stock


@dataclass(frozen=True, slots=True)
class Seller:
    """Who answers, with what is known when the offer comes."""

    me: PeerId
    stock: Mapping[ModelName, Stock]
    draining: bool
    price_ceiling: PriceList | None
    """The network's, which holds where a client names none; None before we were told."""
    answered: Container[RequestId]
    bid_validity: Milliseconds
    warm_tokens: int = 0
    """Of this offer's prompt, what the model's engine need not compute."""
    max_delay: Milliseconds = NO_DELAY
    """How long a model may take to be loaded for this job."""


def answer_offer(offer: JobOffer, seller: Seller, *, now: UnixMilliseconds) -> Bid | Pass | None:
    """Our Bid, our Pass with its reason, or None if we are to keep silent.

    `now` is read on the coordinator's clock, as every deadline is.
    """
    terms = offer.terms
    if now >= offer.closes_at or now >= terms.deadline or terms.request_id in seller.answered:
        return None
    if draw(seller.me, terms.request_id) >= offer.threshold:
        return None
    stock = seller.stock.get(terms.model)
    reason = reason_to_pass(terms, seller, stock)
    if reason is not None or stock is None:
        return Pass(
            request_id=terms.request_id,
            bidder=seller.me,
            reason=reason or PassReason.NOT_SERVED,
        )
    return Bid(
        request_id=terms.request_id,
        bidder=seller.me,
        model_digest=stock.offer.digest,
        prices=stock.offer.prices,
        context_window=stock.offer.context_window,
        warm_tokens=seller.warm_tokens,
        delay_ms=stock.delay,
        expires_at=UnixMilliseconds(offer.closes_at + seller.bid_validity),
    )


def reason_to_pass(terms: JobTerms, seller: Seller, stock: Stock | None) -> PassReason | None:
    """Why we do not want this job; None if we do.  Lasting reasons come before passing ones."""
    if stock is None or not _is_asked_for(stock, terms):
        return PassReason.NOT_SERVED
    # The auction's own rule: a bid with a smaller window would only lose.
    if terms.input_estimate + terms.output_limit > stock.offer.context_window:
        return PassReason.CONTEXT_TOO_SMALL
    ceiling = terms.max_prices or seller.price_ceiling
    if ceiling is not None and not stock.offer.prices.is_within(ceiling):
        return PassReason.PRICE_TOO_LOW
    return _passing_reason(seller, stock)


def _is_asked_for(stock: Stock, terms: JobTerms) -> bool:
    return terms.kind in stock.offer.kinds and terms.model_digest in (None, stock.offer.digest)


def _passing_reason(seller: Seller, stock: Stock) -> PassReason | None:
    if seller.draining:
        return PassReason.DRAINING
    if not stock.ready:
        return PassReason.ENGINE_UNAVAILABLE
    if stock.is_full:
        return PassReason.FULL
    if stock.delay > seller.max_delay:
        return PassReason.ENGINE_UNAVAILABLE
    return None
