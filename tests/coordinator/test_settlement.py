from __future__ import annotations

from dataclasses import replace

import pytest
from contracts import (
    GATEWAY,
    STANDBY,
    STRANGER,
    WINNER,
    deliver,
    make_contract,
    make_job,
    prove,
)
from hypothesis import given
from hypothesis import strategies as st
from market_town import PRICES, START, TEXT, make_delivery, make_report, make_voucher

from pinaivu_node.coordinator.job import Job
from pinaivu_node.coordinator.ledger import settle_entry
from pinaivu_node.coordinator.settlement import bill, receipt_for
from pinaivu_node.protocol.ids import digest_of
from pinaivu_node.protocol.market import Outcome, SegmentOutcome
from pinaivu_node.protocol.money import ZERO_USAGE, TokenUsage, cost

UPLIFT = 100_000


def usage(prompt=100, cached=0, output=50) -> TokenUsage:
    return TokenUsage(input=prompt, cached_input=cached, output=output)


def settled(*, proven=None, reports=None, voucher=None, outcome=Outcome.COMPLETED, terms=None):
    """The bill of a job of which this was said; `proven` and `reports` are by provider."""
    job = make_job(**(terms or {}))
    for signer, claim in (proven or {}).items():
        prove(job, signer, claim, voucher=voucher)
    if reports is not None:
        segments = [make_report(signer.peer_id, **said) for signer, said in reports.items()]
        deliver(job, make_delivery(GATEWAY.peer_id, *segments, outcome=outcome))
    return job, bill(job)


@pytest.mark.parametrize(("warm", "paid"), [(0, (100, 0)), (30, (70, 30)), (10**8, (0, 100))])
def test_what_was_claimed_to_be_warm_is_paid_as_warm(warm, paid):
    """The claim made the bid cheaper; a cold prompt at the full price was not what won."""
    contract = make_contract()
    claimed = tuple(replace(award, warm_tokens=warm) for award in contract.awards)
    job = Job(replace(contract, awards=claimed))
    prove(job, WINNER, usage())
    deliver(job, make_delivery(GATEWAY.peer_id, make_report(WINNER.peer_id, usage=usage())))
    [segment] = bill(job).segments
    assert (segment.usage.input, segment.usage.cached_input) == paid


def price(used: TokenUsage) -> int:
    return cost(used, PRICES, uplift_ppm=UPLIFT) if used.output else 0


# What was proven, what was delivered, what the vouchers admit, and what is therefore paid.
TABLE = {
    "both agree": (usage(), usage(), None, usage()),
    "the proof says less": (usage(90, 0, 40), usage(), None, usage(90, 0, 40)),
    "the delivery says less": (usage(), usage(90, 0, 40), None, usage(90, 0, 40)),
    "each says less of something": (usage(10, 90, 50), usage(100, 0, 40), None, usage(10, 0, 40)),
    "no proof: the gateway's own admission": (None, usage(), None, usage()),
    "no delivery, no voucher": (usage(), None, None, usage(100, 0, 0)),
    "no delivery: what was vouchered": (usage(), None, 32, usage(100, 0, 32)),
    "a voucher beyond the proof": (usage(), None, 99, usage()),
    "a delivery below the gateway's own voucher": (usage(), usage(0, 0, 0), 32, usage(0, 0, 32)),
    "a voucher below the delivery": (usage(), usage(), 32, usage()),
    "neither": (None, None, None, None),
    "no output": (usage(100, 0, 0), usage(100, 0, 0), None, usage(100, 0, 0)),
    "beyond the limits": (usage(999, 0, 999), usage(999, 0, 999), None, usage(200, 0, 100)),
    "beyond the limits, warm": (
        usage(999, 150, 9), usage(999, 150, 9), None, usage(50, 150, 9),
    ),
    "an inflated prompt nobody confirms": (usage(200), None, 50, usage(100)),
    "a warm prompt nobody confirms": (usage(90, 30), None, 50, usage(70, 30)),
}  # fmt: skip


@pytest.mark.parametrize(("proof", "report", "voucher", "paid"), TABLE.values(), ids=TABLE)
def test_the_smaller_count_of_what_can_be_believed_is_paid(proof, report, voucher, paid):
    envelope = make_voucher(GATEWAY, WINNER.peer_id, voucher) if voucher is not None else None
    _, result = settled(
        proven={WINNER: proof} if proof else {},
        reports={WINNER: {"usage": report}} if report else None,
        voucher=envelope,
    )
    if paid is None:
        assert (result.segments, result.amount) == ((), 0)
    else:
        [segment] = result.segments
        assert segment.usage == paid
        assert result.amount == segment.amount == price(paid)


BAD_VOUCHERS = {
    "signed by another": make_voucher(STRANGER, WINNER.peer_id, 50),
    "for another provider": make_voucher(GATEWAY, STANDBY.peer_id, 50),
    "for another request": make_voucher(GATEWAY, WINNER.peer_id, 50, number=2),
    "forged": make_voucher(GATEWAY, WINNER.peer_id, 50).model_copy(update={"signature": bytes(64)}),
    "of another kind": GATEWAY.seal(make_delivery(GATEWAY.peer_id)),
}


@pytest.mark.parametrize("voucher", BAD_VOUCHERS.values(), ids=BAD_VOUCHERS)
def test_a_bad_voucher_is_worth_nothing(voucher):
    _, result = settled(proven={WINNER: usage()}, voucher=voucher)
    assert (result.amount, result.outcome) == (0, Outcome.ABANDONED)


def test_the_outcome_is_the_gateways_word_or_abandoned():
    assert settled()[1].outcome is Outcome.ABANDONED
    assert settled(proven={WINNER: usage()})[1].outcome is Outcome.ABANDONED
    for said in Outcome:
        given_ = settled(reports={WINNER: {}}, outcome=said)[1].outcome
        assert given_ is (Outcome.FAILED if said is Outcome.ABANDONED else said)


def test_a_standby_that_took_over_is_paid_and_the_one_that_refused_is_not():
    refused = {"usage": ZERO_USAGE, "outcome": SegmentOutcome.REFUSED, "ttft_ms": None}
    _, result = settled(
        proven={STANDBY: usage()}, reports={WINNER: refused, STANDBY: {"usage": usage()}}
    )
    first, second = result.segments
    assert (first.provider, first.amount, first.outcome) == (
        WINNER.peer_id, 0, SegmentOutcome.REFUSED,
    )  # fmt: skip
    assert (second.provider, second.amount) == (STANDBY.peer_id, price(usage()))
    assert [share.provider for share in result.shares] == [STANDBY.peer_id]


def test_a_resumed_job_pays_each_its_part_and_the_limits_hold_for_the_sum():
    parts = {WINNER: usage(100, 0, 60), STANDBY: usage(200, 0, 60)}
    _, result = settled(
        proven=parts, reports={signer: {"usage": part} for signer, part in parts.items()}
    )
    assert [segment.usage for segment in result.segments] == [
        usage(100, 0, 60), usage(200, 0, 40),
    ]  # fmt: skip


def test_who_holds_no_token_is_not_paid():
    _, result = settled(reports={STRANGER: {"usage": usage()}, WINNER: {"usage": usage()}})
    assert [segment.provider for segment in result.segments] == [WINNER.peer_id]


def test_a_part_that_the_gateway_hides_is_paid_by_its_vouchers():
    voucher = make_voucher(GATEWAY, WINNER.peer_id, 32)
    _, result = settled(
        proven={WINNER: usage()}, reports={STANDBY: {"usage": ZERO_USAGE}}, voucher=voucher
    )
    assert [(segment.provider, segment.usage.output) for segment in result.segments] == [
        (STANDBY.peer_id, 0), (WINNER.peer_id, 32),
    ]  # fmt: skip


def test_the_fee_is_the_networks_share_rounded_for_the_provider():
    _, result = settled(proven={WINNER: usage()}, reports={WINNER: {"usage": usage()}})
    assert result.amount == 16_500
    assert result.fee == 330


def receipt_of(job, result):
    return receipt_for(
        job.contract, result, coordinator=STRANGER.peer_id, ledger_entry=7, now=START
    )


def test_the_receipt_names_what_it_was_made_from():
    job, result = settled(proven={WINNER: usage()}, reports={WINNER: {"usage": usage()}})
    receipt = receipt_of(job, result)
    assert receipt.delivery == job.delivery.envelope.digest
    assert receipt.segments[0].proof == job.proofs[WINNER.peer_id].envelope.digest
    assert receipt.output_hash == TEXT
    assert (receipt.provider, receipt.ledger_entry) == (WINNER.peer_id, 7)


def test_a_job_of_which_nothing_was_heard_has_a_receipt_too():
    job, result = settled()
    receipt = receipt_of(job, result)
    assert (receipt.delivery, receipt.segments, receipt.amount) == (None, (), 0)
    assert receipt.output_hash == digest_of(b"")


tokens = st.one_of(st.integers(0, 300), st.just(100_000_000))
usages = st.builds(TokenUsage, input=tokens, cached_input=tokens, output=tokens)
parties = st.sampled_from([WINNER, STANDBY, STRANGER])


@given(
    st.dictionaries(st.sampled_from([WINNER, STANDBY]), usages),
    st.none() | st.dictionaries(parties, usages.map(lambda used: {"usage": used})),
    st.none() | st.integers(0, 1000),
    st.integers(0, 10_000_000),
)
def test_whatever_is_said_the_bill_fits_the_hold_and_balances(proven, reports, voucher, uplift):
    envelope = make_voucher(GATEWAY, WINNER.peer_id, voucher) if voucher is not None else None
    job, result = settled(
        proven=proven, reports=reports, voucher=envelope, terms={"uplift_ppm": uplift}
    )
    assert 0 <= result.fee <= result.amount <= job.contract.hold
    assert result.amount == sum(segment.amount for segment in result.segments)
    entry = settle_entry(
        GATEWAY.peer_id, job.request_id, hold=job.contract.hold, shares=result.shares
    )
    assert sum(posting.amount for posting in entry.postings) == 0
    for segment in result.segments:
        assert segment.usage.output <= 100
        assert segment.usage.output or not segment.amount
