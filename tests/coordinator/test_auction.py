from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from market_town import DIGEST, PRICES, START, make_bid, make_terms, request_id, signer_of

from pinaivu_node.coordinator.auction import (
    Answer,
    LossReason,
    bid_set_leaves,
    ceiling_of,
    decide,
    open_bid_set_untrusted,
    wait_share,
)
from pinaivu_node.coordinator.config import DEFAULT_POLICY
from pinaivu_node.coordinator.job import hold_for
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import MILLION, digest_of
from pinaivu_node.protocol.market import (
    AnswerRecord,
    AuctionRecord,
    Measurement,
    Pass,
    PassReason,
    Preference,
)
from pinaivu_node.protocol.money import PriceList, TokenUsage, cost

SIGNERS = [signer_of(f"bidder {n}") for n in range(6)]
MEASURED = Measurement(
    ttft_ms=100, millitokens_per_second=50_000, reliability_ppm=MILLION, samples=10
)
CEILING = DEFAULT_POLICY.price_ceiling


def make_record(policy=DEFAULT_POLICY, allow=None, deny=(), **terms) -> AuctionRecord:
    return AuctionRecord(
        coordinator=signer_of("coordinator").peer_id,
        gateway=signer_of("gateway").peer_id,
        terms=make_terms(**terms),
        allow=allow,
        deny=deny,
        policy=policy,
        opened_at=START,
        closed_at=START + 50,
    )


def make_answer(number=0, *, measurement=MEASURED, banned=False, full=False, at=1, **bid) -> Answer:
    message = make_bid(SIGNERS[number], **bid)
    return Answer(message, START + at, measurement, banned=banned, full=full)


def of_output(price: int) -> PriceList:
    return PriceList(input=price // 4, cached_input=price // 16, output=price)


def test_the_lowest_generalised_cost_wins_and_is_paid_what_would_have_tied():
    asked = (300, 100, 200)
    answers = [make_answer(n, prices=of_output(x * MILLION)) for n, x in enumerate(asked)]
    result = decide(make_record(), answers)
    assert [award.provider for award in result.awards] == [SIGNERS[n].peer_id for n in (1, 2, 0)]
    first, second, third = result.awards
    assert first.expected_cost == 7_500
    assert first.pay == second.expected_cost == 15_000
    assert second.pay == third.expected_cost == 22_500
    assert third.pay == 120_000  # nobody is left to tie with: the network's ceiling
    assert result.losers == ()


def test_a_faster_provider_beats_a_cheaper_one_for_who_values_time():
    slow = MEASURED.model_copy(update={"millitokens_per_second": 5_000})
    answers = [
        make_answer(0, prices=of_output(100 * MILLION), measurement=slow),
        make_answer(1, prices=of_output(200 * MILLION)),
    ]
    winners = {
        preference: decide(make_record(preference=preference), answers).awards[0].provider
        for preference in Preference
    }
    assert winners == {
        Preference.PRICE: SIGNERS[0].peer_id,
        Preference.BALANCED: SIGNERS[1].peer_id,
        Preference.LATENCY: SIGNERS[1].peer_id,
    }


def test_an_unreliable_provider_counts_as_dearer():
    shaky = MEASURED.model_copy(update={"reliability_ppm": 400_000})
    answers = [
        make_answer(0, prices=of_output(100 * MILLION), measurement=shaky),
        make_answer(1, prices=of_output(200 * MILLION)),
    ]
    result = decide(make_record(preference=Preference.PRICE), answers)
    assert result.awards[0].provider == SIGNERS[1].peer_id


def test_a_warm_prefix_saves_money_and_time():
    warm = make_answer(0, warm_tokens=1_000_000)
    award = decide(make_record(), [warm]).awards[0]
    assert award.expected_cost == cost(TokenUsage(input=0, cached_input=100, output=50), PRICES)
    assert award.expected_time_ms == 1012  # 50 tokens at 50 a second, and an eighth of the wait
    assert award.warm_tokens == 100  # as many as the prompt is expected to have


def test_what_a_bidder_has_to_do_first_counts_as_its_time():
    answers = [make_answer(0, delay_ms=4_000), make_answer(1)]
    cold, warm = (SIGNERS[n].peer_id for n in range(2))
    result = decide(make_record(preference=Preference.LATENCY), answers)
    assert [award.provider for award in result.awards] == [warm, cold]
    first, second = result.awards
    assert second.expected_time_ms == first.expected_time_ms + 4_000
    assert (first.delay_ms, second.delay_ms) == (0, 4_000)
    patient = decide(make_record(preference=Preference.LATENCY), answers[:1])
    assert patient.awards[0].provider == cold, "one who can be waited for is better than nobody"


def test_half_a_warm_prompt_saves_half_of_what_can_be_saved():
    award = decide(make_record(), [make_answer(0, warm_tokens=50)]).awards[0]
    assert award.expected_time_ms == 1056
    assert wait_share(make_record().terms, warm_tokens=0) == MILLION


def test_with_one_bidder_the_ceiling_is_the_reserve():
    ceiling = of_output(300 * MILLION)
    award = decide(
        make_record(max_prices=ceiling), [make_answer(prices=of_output(200 * MILLION))]
    ).awards[0]
    assert award.uplift_ppm == 500_000
    assert award.pay == cost(TokenUsage(input=100, cached_input=0, output=50), ceiling)


def test_the_clients_ceiling_counts_even_above_the_networks():
    high = CEILING.model_copy(update={"output": CEILING.output * 2})
    record = make_record(max_prices=high)
    assert ceiling_of(record.terms, record.policy) == high
    answer = make_answer(prices=PRICES.model_copy(update={"output": CEILING.output + 1}))
    assert decide(record, [answer]).awards
    assert decide(make_record(), [answer]).losers[0].reason is LossReason.ABOVE_CEILING


def test_a_free_bid_is_paid_nothing():
    free = PriceList(input=0, cached_input=0, output=0)
    result = decide(make_record(), [make_answer(0, prices=free), make_answer(1)])
    assert (result.awards[0].provider, result.awards[0].uplift_ppm) == (SIGNERS[0].peer_id, 0)
    assert result.awards[0].pay == 0


def test_ties_end_in_the_order_of_names():
    result = decide(make_record(), [make_answer(n) for n in range(4)])
    winners = [award.provider for award in result.awards]
    assert winners == sorted(signer.peer_id for signer in SIGNERS[:4])[:3]
    assert result.awards[0].uplift_ppm == 0
    assert result.losers[0].reason is LossReason.OUTBID
    assert result.losers[0].margin == 0


INELIGIBLE = [
    (LossReason.LATE, {}, {"at": 51}),
    (LossReason.EXPIRED, {}, {"expires_at": START + 50}),
    (LossReason.BANNED, {}, {"banned": True}),
    (LossReason.NOT_ALLOWED, {"allow": ()}, {}),
    (LossReason.NOT_ALLOWED, {"allow": (SIGNERS[1].peer_id,)}, {}),
    (LossReason.DENIED, {"deny": (SIGNERS[0].peer_id,)}, {}),
    (LossReason.FULL, {}, {"full": True}),
    (LossReason.WRONG_DIGEST, {"model_digest": digest_of(b"other")}, {}),
    (LossReason.CONTEXT_TOO_SMALL, {}, {"context_window": 199}),
    (LossReason.ABOVE_CEILING, {"max_prices": of_output(100)}, {}),
    (LossReason.MALFORMED, {}, {"request_id": request_id(2)}),
]


@pytest.mark.parametrize(("reason", "record", "answer"), INELIGIBLE)
def test_whoever_is_not_eligible_loses_with_a_reason(reason, record, answer):
    result = decide(make_record(**record), [make_answer(**answer)])
    assert result.awards == ()
    assert [(loser.reason, loser.margin) for loser in result.losers] == [(reason, None)]


def test_what_is_just_enough_is_eligible():
    record = make_record(allow=(SIGNERS[0].peer_id,), model_digest=DIGEST, max_prices=PRICES)
    answer = make_answer(context_window=200, expires_at=START + 51, at=50)
    assert decide(record, [answer]).awards


def test_a_pass_loses_by_its_own_reason():
    message = Pass(
        request_id=request_id(), bidder=SIGNERS[0].peer_id, reason=PassReason.PRICE_TOO_LOW
    )
    answer = Answer(message, START, MEASURED, banned=False, full=False)
    loser = decide(make_record(), [answer]).losers[0]
    assert (loser.reason, loser.detail) == (LossReason.PASSED, "price_too_low")


def test_a_provider_without_any_reliability_divides_by_one():
    hopeless = MEASURED.model_copy(update={"reliability_ppm": 0})
    assert decide(make_record(), [make_answer(measurement=hopeless), make_answer(1)]).awards[1]


# --- properties -----------------------------------------------------------------------------------

prices = st.builds(
    PriceList,
    input=st.integers(0, CEILING.input),
    cached_input=st.integers(0, CEILING.cached_input),
    output=st.integers(0, CEILING.output),
)
measurements = st.builds(
    Measurement,
    ttft_ms=st.integers(0, 5_000),
    millitokens_per_second=st.integers(1_000, 10**6),
    reliability_ppm=st.integers(1, MILLION),
    samples=st.just(5),
)


@st.composite
def auctions(draw, least=1):
    count = draw(st.integers(least, len(SIGNERS)))
    answers = [
        make_answer(
            number,
            prices=draw(prices),
            measurement=draw(measurements),
            warm_tokens=draw(st.sampled_from([0, 0, 30, 1000])),
        )
        for number in range(count)
    ]
    terms = {
        "input_estimate": draw(st.integers(0, 1000)),
        "input_limit": 1000,
        "output_estimate": draw(st.integers(0, 500)),
        "output_limit": 500,
        "preference": draw(st.sampled_from(Preference)),
    }
    return make_record(**terms), answers


@given(auctions(), st.randoms(use_true_random=False))
def test_the_order_of_the_answers_is_nothing(auction, dice):
    record, answers = auction
    shuffled = dice.sample(answers, len(answers))
    assert decide(record, shuffled) == decide(record, answers)


@given(auctions(), st.integers(0, 1000), st.integers(0, 500), st.integers(0, 1000))
def test_no_bill_can_pass_the_hold_and_no_price_its_ceiling(auction, fresh, output, warm):
    record, answers = auction
    assume(fresh + warm <= 1000)
    hold = hold_for(record.terms, record.policy)
    for award in decide(record, answers).awards:
        for kind in ("input", "cached_input", "output"):
            raised = getattr(award.prices, kind) * (MILLION + award.uplift_ppm)
            assert raised <= getattr(CEILING, kind) * MILLION
        usage = TokenUsage(input=fresh, cached_input=warm, output=output)
        assert cost(usage, award.prices, uplift_ppm=award.uplift_ppm) <= hold
        assert award.pay >= award.expected_cost


nanox_per_token = st.integers(1, CEILING.output // MILLION)


@given(auctions(), nanox_per_token, nanox_per_token)
def test_asking_the_true_cost_is_never_worse(auction, true_price, asked_price):
    """Money is whole and the uplift a whole number of ppm: what rounding gives is no strategy."""
    record, rivals = auction
    tokens = record.terms.output_estimate

    def gain(price: int) -> int:
        answer = make_answer(0, prices=PriceList(input=0, cached_input=0, output=price * MILLION))
        winner = decide(record, [answer, *rivals[1:]]).awards[0]
        return winner.pay - true_price * tokens if winner.provider == SIGNERS[0].peer_id else 0

    rounding = 3 + CEILING.output * tokens // MILLION // MILLION
    assert gain(asked_price) <= gain(true_price) + rounding
    assert gain(true_price) >= 0


@given(auctions())
def test_whoever_replays_the_published_leaves_gets_the_same_result(auction):
    record, answers = auction
    by_bidder = {signer.peer_id: signer for signer in SIGNERS}
    kept = [
        AnswerRecord(
            answer=by_bidder[answer.message.bidder].seal(answer.message),
            received_at=answer.received_at,
            measurement=answer.measurement,
            banned=answer.banned,
            full=answer.full,
        )
        for answer in answers
    ]
    opened, replayed = open_bid_set_untrusted(bid_set_leaves(record, kept))
    assert opened == record
    assert decide(opened, replayed) == decide(record, answers)


# --- hostile bid sets -----------------------------------------------------------------------------


def leaf_of(message, signer) -> AnswerRecord:
    return AnswerRecord(
        answer=signer.seal(message),
        received_at=START,
        measurement=MEASURED,
        banned=False,
        full=False,
    )


def test_a_bid_set_that_does_not_hold_together_is_refused():
    record, one, two = make_record(), SIGNERS[0], SIGNERS[1]
    good = leaf_of(make_bid(one), one)
    forged = good.model_copy(
        update={"answer": good.answer.model_copy(update={"signature": bytes(64)})}
    )
    cases = [
        bid_set_leaves(record, [forged]),
        bid_set_leaves(record, [leaf_of(make_bid(one), two)]),
        bid_set_leaves(record, [leaf_of(make_bid(one, 2), one)]),
        bid_set_leaves(record, [good, good]),
        (),
        (b"",),
        bid_set_leaves(record, [good])[1:],
        (*bid_set_leaves(record, [good]), b"\xc1"),
    ]
    for leaves in cases:
        with pytest.raises(RemoteProtocolError):
            open_bid_set_untrusted(leaves)


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_whatever_the_leaves_only_the_peers_fault_is_raised(leaves):
    with pytest.raises(RemoteProtocolError):
        open_bid_set_untrusted(leaves)
