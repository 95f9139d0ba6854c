from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from market_town import DIGEST, START, make_report, make_terms, signer_of

from pinaivu_node.coordinator.auction import wait_share
from pinaivu_node.coordinator.config import DEFAULT_POLICY
from pinaivu_node.coordinator.reputation import (
    HALF_LIFE_MS,
    MOST_SAMPLES,
    SAMPLE,
    Average,
    Reputation,
    Subject,
    Track,
    is_measured,
)
from pinaivu_node.protocol.ids import MAX_SAFE_INTEGER, MILLION
from pinaivu_node.protocol.market import SegmentOutcome
from pinaivu_node.protocol.money import TokenUsage

PEER = signer_of("provider").peer_id
SUBJECT = Subject(PEER, DIGEST)


def measured(*reports, now=START):
    reputation = Reputation(DEFAULT_POLICY)
    for report in reports:
        reputation.learn(SUBJECT, reputation.after(SUBJECT, report, now=START))
    return reputation.measurement(SUBJECT, now=now)


@pytest.mark.parametrize(
    ("outcome", "output", "proven", "counts"),
    [
        (SegmentOutcome.COMPLETED, 5, True, True),
        (SegmentOutcome.COMPLETED, 5, False, False),
        (SegmentOutcome.COMPLETED, 0, True, False),
        (SegmentOutcome.CANCELLED, 5, False, False),
        (SegmentOutcome.DIED, 0, False, True),
    ],
)
def test_nobody_gets_a_record_for_nothing(outcome, output, proven, counts):
    usage = TokenUsage(input=1, cached_input=0, output=output)
    report = make_report(PEER, outcome=outcome, usage=usage)
    assert is_measured(report, proven=proven) is counts


def test_a_newcomer_has_the_prior():
    prior = measured()
    assert prior.ttft_ms == DEFAULT_POLICY.prior_ttft_ms
    assert prior.millitokens_per_second == DEFAULT_POLICY.prior_millitokens_per_second
    assert prior.reliability_ppm == DEFAULT_POLICY.prior_reliability_ppm
    assert prior.samples == 0


def test_one_job_moves_it_by_its_share_beside_the_prior():
    # 50 tokens in 510 ms of which 20 ms to the first: 49 in 490 ms, 100 a second
    once = measured(make_report(PEER))
    assert once.ttft_ms == (4 * 400 + 20) // 5
    assert once.millitokens_per_second == (4 * 20_000 + 100_000) // 5
    assert once.reliability_ppm == (4 * 900_000 + MILLION) // 5
    assert once.samples == 1


def test_who_says_warm_what_is_cold_is_taken_for_slower():
    """Until the auction foretells of such a bid the wait that it really brings, and no less."""
    terms = make_terms()
    share = wait_share(terms, warm_tokens=terms.input_estimate)
    cold = make_report(PEER, ttft_ms=300)
    honest, liar = Reputation(DEFAULT_POLICY), Reputation(DEFAULT_POLICY)
    for _ in range(100):
        honest.learn(SUBJECT, honest.after(SUBJECT, cold, now=START))
        liar.learn(SUBJECT, liar.after(SUBJECT, cold, now=START, wait_share=share))
    believed = liar.measurement(SUBJECT, now=START).ttft_ms
    assert honest.measurement(SUBJECT, now=START).ttft_ms == pytest.approx(300, rel=0.05)
    assert believed * share // MILLION == pytest.approx(300, rel=0.15)


def test_a_warm_prompts_wait_does_not_pass_for_a_cold_ones():
    terms = make_terms()
    share = wait_share(terms, warm_tokens=terms.input_estimate // 2)
    quick = make_report(PEER, ttft_ms=300 * share // MILLION)
    reputation = Reputation(DEFAULT_POLICY)
    for _ in range(100):
        track = reputation.after(SUBJECT, quick, now=START, wait_share=share)
        reputation.learn(SUBJECT, track)
    assert reputation.measurement(SUBJECT, now=START).ttft_ms == pytest.approx(300, rel=0.05)


def test_a_delay_that_was_said_is_not_held_against_its_provider_twice():
    after = Reputation(DEFAULT_POLICY).after
    cold = make_report(PEER, ttft_ms=4_300)
    warm = make_report(PEER, ttft_ms=300)
    track = after(SUBJECT, cold, now=START, delay_ms=4_000)
    assert track.ttft_ms == after(SUBJECT, warm, now=START).ttft_ms
    early = after(SUBJECT, make_report(PEER, ttft_ms=3_000), now=START, delay_ms=4_000)
    assert early.ttft_ms.weight == 0, "nobody gets to look fast by saying slow"


def test_many_jobs_outweigh_the_prior_and_at_most_the_last_thirty_count():
    many = measured(*[make_report(PEER)] * 100)
    assert many.samples == MOST_SAMPLES
    assert many.ttft_ms == (4 * 400 + 32 * 20) // 36
    bad = make_report(PEER, outcome=SegmentOutcome.DIED)
    assert measured(*[make_report(PEER)] * 100, *[bad] * 32).reliability_ppm < 500_000


@pytest.mark.parametrize("outcome", ["refused", "died", "stalled", "error"])
def test_each_fault_lowers_reliability(outcome):
    report = make_report(PEER, outcome=SegmentOutcome(outcome))
    assert measured(report).reliability_ppm == 4 * 900_000 // 5


def test_a_client_that_leaves_is_no_fault_but_what_was_seen_counts():
    left = measured(make_report(PEER, outcome=SegmentOutcome.CANCELLED))
    assert left.reliability_ppm == DEFAULT_POLICY.prior_reliability_ppm
    assert left.ttft_ms < DEFAULT_POLICY.prior_ttft_ms


def test_a_few_tokens_say_nothing_about_speed_and_no_token_nothing_about_ttft():
    few = make_report(PEER, usage=TokenUsage(input=1, cached_input=0, output=7))
    assert measured(few).millitokens_per_second == DEFAULT_POLICY.prior_millitokens_per_second
    none = make_report(PEER, ttft_ms=None)
    assert measured(none).ttft_ms == DEFAULT_POLICY.prior_ttft_ms


def test_in_idle_hours_everything_drifts_back_to_the_prior():
    bad = [make_report(PEER, outcome=SegmentOutcome.DIED)] * 32
    at_once = measured(*bad).reliability_ppm
    later = measured(*bad, now=START + 5 * HALF_LIFE_MS).reliability_ppm
    assert at_once < 150_000
    assert later > 700_000
    assert measured(*bad, now=START + 10_000 * HALF_LIFE_MS) == measured()


@given(
    st.integers(0, 10**10), st.integers(0, 10**10), st.integers(0, 100_000_000), st.integers(0, 9)
)
def test_no_report_leads_out_of_bounds(ttft, duration, output, earlier):
    usage = TokenUsage(input=0, cached_input=0, output=output)
    report = make_report(PEER, ttft_ms=ttft, duration_ms=duration, usage=usage)
    result = measured(*[report] * (earlier + 1))
    assert 1 <= result.millitokens_per_second <= 10**9
    assert 0 <= result.ttft_ms <= 10 * 60 * 1000


@given(st.integers(0, MILLION), st.integers(0, MOST_SAMPLES * SAMPLE), st.integers(0, 2**60))
def test_ageing_only_takes_weight(mean, weight, elapsed):
    aged = Average(mean, weight).aged(elapsed)
    assert aged.mean == mean
    assert 0 <= aged.weight <= weight
    assert Average(mean, weight).aged(-5) == Average(mean, weight)


def test_a_clock_that_goes_back_does_no_harm():
    track = Track().after(make_report(PEER), now=START)
    assert track.after(make_report(PEER), now=START - 1000).updated_at == START
    assert track.aged(MAX_SAFE_INTEGER).ttft_ms.weight == 0
