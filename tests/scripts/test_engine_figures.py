from __future__ import annotations

import pytest

from scripts.benchmarks.engine import decode, figures
from scripts.benchmarks.engine.contenders.turns import TICKS
from scripts.benchmarks.engine.cores import idle_seconds, share_out
from scripts.benchmarks.engine.decode import PINAIVU, VLLM, Rates, rows_of
from scripts.benchmarks.engine.figures import at_least, at_most


def by_name(rows):
    return {row["figure"]: row for row in rows}


def test_a_row_states_median_spread_and_how_many_rounds_there_were():
    row = figures.row("speed", [3.0, 1.0, 2.0], at_least(2), unit="×")
    assert row["measured"] == "2 × (1–3, n=3)"
    assert row["target"] == "≥ 2 ×"
    assert row["met"] is True
    assert (row["median"], row["rounds"]) == (2.0, [3.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (at_least(1.8), 1.8, True),
        (at_least(1.8), 1.79, False),
        (at_most(4), 4.0, True),
        (at_most(4), 4.01, False),
        (at_least(1, aim=True), 1.1, True),
        (at_least(1, aim=True), 0.9, None),
    ],
)
def test_a_target_is_met_or_missed_and_an_aim_is_never_missed(target, value, met):
    assert target.met(value) is met


def test_a_figure_that_could_not_be_measured_says_why_and_is_neither_met_nor_missed():
    row = figures.missing("÷ other", "no wheel for this machine", at_least(1))
    assert row["measured"] == "not measured: no wheel for this machine"
    assert row["met"] is None


def test_ratios_are_taken_round_by_round():
    assert figures.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        figures.ratios([1.0, 2.0], [1.0])


def test_a_quantile_is_one_of_the_values():
    values = [float(value) for value in range(100, 0, -1)]
    assert figures.quantile(values, 0.5) == 51
    assert figures.quantile(values, 0.99) == 100
    assert figures.quantile([7.0], 0.99) == 7


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (0.06784, "0.0678"), (2.0, "2")]
)
def test_numbers_are_shown_with_three_digits(value, text):
    assert figures.shown(value) == text


def test_every_contender_begins_a_round_in_turn():
    names = ["a", "b", "c"]
    assert [figures.turns(names, number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert all(sorted(figures.turns(names, number)) == names for number in range(4))


def contested() -> Rates:
    rates = Rates(bandwidth=[16e9, 16e9])
    for batch, ours, theirs in ((1, 20, 25), (16, 160, 150)):
        for _ in range(2):
            rates.add(PINAIVU, batch, ours)
            rates.add(VLLM, batch, theirs)
    return rates


def test_rates_become_ratios_with_the_targets_of_their_batch_and_dtype():
    rows = by_name(
        rows_of(contested(), "float32", weights=538_000_000, opponents=(VLLM, decode.LLAMA_CPP))
    )
    assert rows["fp32 ÷ vLLM eager, batch 1"]["met"] is False
    assert rows["fp32 ÷ vLLM eager, batch 16"]["met"] is True
    assert rows["fp32 batch 16 ÷ batch 1"]["median"] == 8
    assert rows["fp32 weights read, of bandwidth"]["median"] == pytest.approx(0.6725)


def test_a_contender_that_fails_halfway_is_named_with_its_reason():
    rates = contested()
    rates.drop(VLLM, "it ended over decode")
    rows = by_name(rows_of(rates, "bfloat16", weights=1, opponents=(VLLM,)))
    assert rows["bf16 ÷ vLLM eager"]["measured"] == "not measured: it ended over decode"
    assert not [name for name in rows if name.startswith("bf16 vLLM")]


def test_the_engine_gets_the_last_cores():
    cores = share_out({0, 2, 5}, threads=1)
    assert (cores.engine, cores.rest, cores.threads) == ((5,), (0, 2), 1)
    assert share_out({3}, threads=1).rest == ()
    with pytest.raises(ValueError, match="there are 2 cores"):
        share_out({0, 1}, threads=3)


def test_idle_time_is_counted_of_the_engines_cores_alone():
    ticks = {0: (5 * TICKS, 20), 1: (3 * TICKS, 2 * TICKS)}
    rows = [f"cpu{core} 1 1 1 {idle} {waiting} 0" for core, (idle, waiting) in ticks.items()]
    statistics = "\n".join(["cpu 1 1 1 900 1", *rows, "intr 5"])
    assert idle_seconds(statistics, (1,)) == 5
    assert idle_seconds(statistics, (0, 1)) == 10 + 20 / TICKS
