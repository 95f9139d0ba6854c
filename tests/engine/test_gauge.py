from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.engine.gauge import Occupancy, SpeedGauge, StepTimes, Timing


def standing(running=0, *, queued=0, capacity=8, prefill=0, rate=0.0) -> Occupancy:
    return Occupancy(
        running=running,
        queued=queued,
        capacity=capacity,
        queued_prefill_tokens=prefill,
        prefill_tokens_per_second=rate,
    )


def answered(gauge, *, seconds=1.0, tokens=11, asked=0.0, ttft=0.1, running=None) -> None:
    timing = Timing(asked=asked)
    gauge.tokens(timing, 1, now=asked + ttft)
    gauge.tokens(timing, tokens - 1, now=asked + ttft + seconds)
    gauge.finished(timing, running=running)


# -- the time of a step ----------------------------------------------------------------------------


def test_between_two_measured_sizes_a_step_takes_what_lies_between():
    times = StepTimes()
    assert times.seconds(3) == 0.0
    times.observe(2, 0.010)
    assert (times.seconds(1), times.seconds(2), times.seconds(8)) == (0.010, 0.010, 0.010)
    times.observe(6, 0.014)
    assert times.seconds(4) == pytest.approx(0.012)
    assert times.seconds(8) == pytest.approx(0.016)
    assert times.seconds(1) == pytest.approx(0.009)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.floats(0.001, 1)), min_size=1),
    st.integers(1, 2000),
)
def test_no_guess_runs_away_with_noise(measured, size):
    times = StepTimes()
    for batch, seconds in measured:
        times.observe(batch, seconds)
    low, high = min(s for _, s in measured), max(s for _, s in measured)
    ratio = max(size, 64) / 1
    assert low / ratio <= times.seconds(size) <= high * ratio


def test_a_change_of_speed_is_followed():
    times = StepTimes()
    times.observe(1, 0.010)
    for _ in range(20):
        times.observe(1, 0.020)
    assert times.seconds(1) == pytest.approx(0.020, rel=0.02)


# -- speed -----------------------------------------------------------------------------------------


def test_the_speed_is_that_of_the_batch_that_one_more_would_make():
    gauge = SpeedGauge()
    assert gauge.speed_estimate(standing()) == 0.0
    gauge.preset(tokens_per_second=100, ttft_ms=50)
    assert gauge.speed_estimate(standing()) == pytest.approx(100)
    gauge.batch(4, 320.0)
    assert gauge.speed_estimate(standing(3)) == pytest.approx(80)
    assert gauge.speed_estimate(standing()) == pytest.approx(100)
    # Where none has room one more runs in the place of another.
    assert gauge.speed_estimate(standing(4, capacity=4)) == pytest.approx(80)
    assert gauge.speed_estimate(standing(2, queued=1)) == pytest.approx(80)


def test_an_answers_own_speed_counts_where_nobody_measures_the_batch():
    gauge = SpeedGauge()
    answered(gauge, running=1)
    assert gauge.speed_estimate(standing()) == pytest.approx(10)
    answered(gauge, tokens=3, seconds=100, running=1)
    assert gauge.speed_estimate(standing()) == pytest.approx(10)
    gauge.finished(Timing(asked=0.0), running=1)
    assert gauge.speed_estimate(standing()) == pytest.approx(10)


def test_the_speed_of_several_answers_is_that_of_each():
    gauge = SpeedGauge()
    timing = Timing(asked=0.0, answers=2)
    gauge.tokens(timing, 2, now=1.0)
    gauge.tokens(timing, 20, now=2.0)
    gauge.finished(timing, running=2)
    assert gauge.speed_estimate(standing(1)) == pytest.approx(10)


# -- the first token -------------------------------------------------------------------------------


def test_with_room_the_first_token_comes_as_it_did_lately():
    gauge = SpeedGauge()
    gauge.preset(tokens_per_second=100, ttft_ms=50)
    assert gauge.ttft_estimate_ms(standing()) == 50
    for _ in range(30):
        answered(gauge, ttft=0.2)
    assert gauge.ttft_estimate_ms(standing()) == pytest.approx(200, abs=2)


def test_who_had_to_wait_says_nothing_about_the_first_token():
    gauge = SpeedGauge()
    gauge.preset(tokens_per_second=100, ttft_ms=50)
    gauge.tokens(Timing(asked=0.0, waited=True), 1, now=9.0)
    assert gauge.ttft_estimate_ms(standing()) == 50


def test_prompts_in_line_delay_the_first_token():
    gauge = SpeedGauge()
    gauge.preset(tokens_per_second=100, ttft_ms=50)
    gauge.prompt(100)
    # 4,000 tokens at 1,000 per second, then 100 of its own, then a step of 10 ms.
    assert gauge.ttft_estimate_ms(standing(2, prefill=4000, rate=1000.0)) == 4110
    assert gauge.ttft_estimate_ms(standing(2, rate=1000.0)) == 110
    # Who has the engine for itself gets what others got that had.
    assert gauge.ttft_estimate_ms(standing(rate=1000.0)) == 50
    gauge.tokens(Timing(asked=0.0, alone=True), 1, now=0.1)
    gauge.tokens(Timing(asked=0.0), 1, now=9.0)
    assert gauge.ttft_estimate_ms(standing(rate=1000.0)) == 60


def test_the_speed_of_prompts_beside_streams_is_believed_once_it_was_measured():
    gauge = SpeedGauge()
    gauge.prompts_beside(50, 0.1)
    gauge.prompts_beside(0, 0.1)
    gauge.prompts_beside(-20, 0.1)
    assert gauge.ttft_estimate_ms(standing(2, prefill=4000, rate=1000.0)) == 8000


@pytest.mark.parametrize("off", [0.5, 3.0])
def test_a_sum_that_is_always_off_is_corrected_and_no_further(off):
    gauge = SpeedGauge()
    load = standing(2, prefill=1000, rate=1000.0)
    for _ in range(20):
        # Eight at once, whose estimates are all made before the first of them is known to be off.
        timings = [Timing(asked=0.0, expected_s=gauge.expected_s(load)) for _ in range(8)]
        for timing in timings:
            gauge.tokens(timing, 1, now=off)
    assert gauge.ttft_estimate_ms(load) == pytest.approx(1000 * off, rel=0.01)


def test_without_a_place_the_wait_is_for_one_and_grows_with_the_queue():
    gauge = SpeedGauge()
    gauge.preset(tokens_per_second=100, ttft_ms=0)
    # Before any answer has ended, one is expected to take 128 steps of 10 ms.
    assert gauge.ttft_estimate_ms(standing(4, capacity=4)) == 320
    for _ in range(50):
        answered(gauge, tokens=801, seconds=8.0, ttft=0.0)
    assert gauge.ttft_estimate_ms(standing(4, capacity=4)) == pytest.approx(2000, rel=0.01)
    three = standing(4, queued=3, capacity=4)
    assert gauge.ttft_estimate_ms(three) == pytest.approx(8000, rel=0.01)
    # Prompts ahead are computed while it waits.
    ahead = standing(4, capacity=4, prefill=500, rate=1000.0)
    assert gauge.ttft_estimate_ms(ahead) == pytest.approx(2010, rel=0.01)


@given(
    running=st.integers(0, 64),
    queued=st.integers(0, 64),
    prefill=st.integers(0, 10**7),
    rate=st.floats(0, 1e6) | st.just(float("nan")),
)
def test_an_estimate_is_never_negative_nor_an_error(running, queued, prefill, rate):
    gauge = SpeedGauge()
    load = standing(running, queued=queued, prefill=prefill, rate=rate)
    assert gauge.ttft_estimate_ms(load) >= 0
    gauge.batch(3, float("nan"))
    gauge.batch(3, 100.0)
    assert gauge.ttft_estimate_ms(load) >= 0
    assert gauge.speed_estimate(load) > 0
