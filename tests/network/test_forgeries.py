"""A coordinator that signs what did not happen: its receipt is valid, and verification says no."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from town import Town, peer_of, seed_of, settled, spoken, until

from pinaivu_node.protocol.ids import digest_of
from pinaivu_node.protocol.market import Outcome
from pinaivu_node.protocol.money import TokenUsage, cost
from pinaivu_node.protocol.receipt import Receipt
from pinaivu_node.protocol.signing import Signer, open_untrusted
from pinaivu_node.verification import Evidence, Expectation, Verdict, verify

Forger = Callable[[Receipt, Evidence], tuple[Receipt, Evidence]]
COORDINATOR = Signer(seed_of("coordinator"))


async def honest(town: Town) -> tuple[Receipt, Evidence, str]:
    """A job as it really was, and everything handed over about it."""
    await town.coordinator()
    await town.provider("cheap")
    await town.provider("dear", output_price=250_000_000)
    market = await town.gateway()
    await until(lambda: len(market.providers()) == 2)
    order = town.order()
    async with market.buy(order) as job:
        text, _ = await spoken(job)
    reply = await settled(market, order)
    evidence = Evidence(
        reply.receipt, reply.proofs, reply.delivery, await market.bid_set(order.request_id)
    )
    receipt = open_untrusted(reply.receipt, Receipt, signer=COORDINATOR.peer_id)
    return receipt, evidence, text


def failures(evidence: Evidence, text: str) -> set[str]:
    expectation = Expectation(coordinator=COORDINATOR.peer_id, answers=(text,))
    return {each.name for each in verify(evidence, expectation) if each.verdict is Verdict.FAILS}


def with_segment(receipt: Receipt, **changes) -> Receipt:
    """The receipt with its one segment changed, and a total that fits it."""
    segment = receipt.segments[0].model_copy(update=changes)
    if "amount" not in changes:
        amount = cost(segment.usage, segment.prices, uplift_ppm=segment.uplift_ppm)
        segment = segment.model_copy(update={"amount": amount})
    return receipt.model_copy(update={"segments": (segment,), "amount": segment.amount})


def inflated(receipt: Receipt) -> TokenUsage:
    usage = receipt.segments[0].usage
    return usage.model_copy(update={"output": usage.output + 1})


def more_tokens(receipt: Receipt, evidence: Evidence):
    return with_segment(receipt, usage=inflated(receipt)), evidence


def nobody_signed(receipt: Receipt, evidence: Evidence):
    forged = with_segment(receipt, proof=None, usage=inflated(receipt))
    forged = forged.model_copy(update={"delivery": None, "outcome": Outcome.ABANDONED})
    return forged, replace(evidence, delivery=None, proofs=())


def completed_without_delivery(receipt: Receipt, evidence: Evidence):
    forged = receipt.model_copy(update={"delivery": None})
    return forged, replace(evidence, delivery=None)


def dearer_uplift(receipt: Receipt, evidence: Evidence):
    return with_segment(receipt, uplift_ppm=receipt.segments[0].uplift_ppm + 1), evidence


def dearer_prices(receipt: Receipt, evidence: Evidence):
    prices = receipt.segments[0].prices
    dear = prices.model_copy(update={"output": prices.output * 2})
    return with_segment(receipt, prices=dear), evidence


def a_rounder_amount(receipt: Receipt, evidence: Evidence):
    return with_segment(receipt, amount=receipt.amount + 1000), evidence


def a_friend_won(receipt: Receipt, evidence: Evidence):
    return receipt.model_copy(update={"provider": peer_of("dear")}), evidence


def a_dropped_bid(receipt: Receipt, evidence: Evidence):
    return receipt, replace(evidence, leaves=evidence.leaves[:-1])


def another_policy(receipt: Receipt, evidence: Evidence):
    return receipt.model_copy(update={"policy_hash": digest_of(b"mine")}), evidence


def a_larger_fee(receipt: Receipt, evidence: Evidence):
    return receipt.model_copy(update={"fee": receipt.fee + 1}), evidence


def other_weights(receipt: Receipt, evidence: Evidence):
    return with_segment(receipt, model_digest=digest_of(b"quantised")), evidence


def another_text(receipt: Receipt, evidence: Evidence):
    return receipt.model_copy(update={"output_hash": digest_of(b"other")}), evidence


@pytest.mark.parametrize(
    ("forge", "caught_by"),
    [
        (more_tokens, {"token counts"}),
        (nobody_signed, {"token counts"}),
        (completed_without_delivery, {"outcome"}),
        (dearer_uplift, {"price"}),
        (dearer_prices, {"price"}),
        (a_rounder_amount, {"bill"}),
        (a_friend_won, {"winner"}),
        (a_dropped_bid, {"bid set"}),
        (another_policy, {"policy"}),
        (a_larger_fee, {"fee"}),
        (other_weights, {"price"}),
        (another_text, {"output hash", "answer"}),
    ],
    ids=lambda each: each.__name__ if callable(each) else "",
)
async def test_a_signed_lie_is_found(
    town: Town, autojump_clock, forge: Forger, caught_by: set[str]
) -> None:
    receipt, evidence, text = await honest(town)
    assert failures(evidence, text) == set()
    forged, handed_over = forge(receipt, evidence)
    resealed = replace(handed_over, receipt=COORDINATOR.seal(forged))
    assert caught_by <= failures(resealed, text)
