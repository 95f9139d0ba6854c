from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.engine import noise
from pinaivu_node.engine.sampling import Sampler, uniform_noise
from pinaivu_node.engine.types import SamplingParams

CPU = torch.device("cpu")


def sampler(*, prompt=(), vocabulary=8, **params) -> Sampler:
    return Sampler(
        SamplingParams(max_tokens=1, **params), prompt=prompt, vocabulary=vocabulary, device=CPU
    )


def draws(logits, count=2000, **params) -> list[int]:
    chooser = sampler(vocabulary=len(logits), **params)
    row = torch.tensor(logits)
    return [chooser.choose(row, position=position) for position in range(count)]


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**31), st.integers(0, 2**20))
def test_the_noise_of_a_vocabulary_is_the_defined_one_to_the_bit(seed, position, token_id):
    stream = noise.stream(seed, position)
    assert uniform_noise(stream, torch.tensor([token_id])).item() == noise.uniform(stream, token_id)


def test_the_noise_never_changes():
    # An auditor of next year must redo today's draws.
    assert noise.stream(0, 0) == 0xE220A8397B1DCDAF
    assert [noise.uniform(noise.stream(42, 7), token) for token in (0, 1, 49151)] == [
        0.8130366761818051,
        0.9134455418061547,
        0.24557575705380624,
    ]


def test_noise_is_uniform():
    numbers = uniform_noise(noise.stream(1, 2), torch.arange(100_000))
    counts = torch.histc(numbers, bins=10, min=0, max=1)
    # 10,000 in each, standard deviation 95: five of them.
    assert (counts - 10_000).abs().max() < 475
    assert numbers.min() > 0
    assert numbers.max() < 1


def test_temperature_zero_takes_the_likeliest():
    assert set(draws([0.0, 3.0, 2.9], temperature=0.0, count=20)) == {1}
    assert set(draws([0.0, 3.0, 2.9], temperature=1e-9, count=20)) == {1}


def test_draws_follow_the_distribution():
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    chosen = draws(logits, count=8000)
    for token, probability in enumerate((0.5, 0.3, 0.15, 0.05)):
        deviation = math.sqrt(probability * (1 - probability) / 8000)
        assert abs(chosen.count(token) / 8000 - probability) < 5 * deviation


def test_a_shortlist_draws_the_same_token_as_the_whole_vocabulary():
    row = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 4
    whole = sampler(vocabulary=5000, seed=3)
    short = sampler(vocabulary=5000, seed=3, top_p=0.999999)
    same = [whole.choose(row, position=i) == short.choose(row, position=i) for i in range(100)]
    assert sum(same) >= 99  # a token outside the nucleus comes once in a million


def test_top_k_leaves_k_tokens():
    assert set(draws([1.0, 1.2, 0.9, 1.1], top_k=2)) == {1, 3}
    assert set(draws([1.0, 1.2], top_k=1, count=50)) == {1}


def test_top_p_leaves_the_fewest_tokens_that_hold_it():
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert set(draws(logits, top_p=0.6)) == {0, 1}
    assert set(draws(logits, top_p=0.71)) == {0, 1, 2}
    assert set(draws(logits, top_p=0.0, count=50)) == {0}


def test_top_p_over_a_flat_vocabulary_is_still_exact():
    chosen = draws([0.0] * 4000, top_p=0.75, count=300)
    assert max(chosen) >= 1024  # beyond the shortlist


def test_min_p_is_relative_to_the_likeliest():
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draws(logits, min_p=0.29)) == {0, 1, 2}


def test_logit_bias_moves_and_unknown_tokens_do_not_matter():
    assert draws([0.0, 1.0], temperature=0.0, logit_bias={0: 5.0, 99: 3.0}, count=1) == [0]
    assert set(draws([9.0, 0.0], logit_bias={0: -100.0}, count=50)) == {1}


@pytest.mark.parametrize("params", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}])
def test_presence_and_frequency_count_what_was_answered(params):
    chooser = sampler(vocabulary=2, prompt=[0], temperature=0.0, **params)
    row = torch.tensor([1.0, 0.0])
    assert chooser.choose(row, position=1) == 0
    chooser.observe(0)
    assert chooser.choose(row, position=2) == 1


def test_the_repetition_penalty_counts_the_prompt_too():
    chooser = sampler(vocabulary=3, prompt=[0, 2], temperature=0.0, repetition_penalty=2.0)
    assert chooser.choose(torch.tensor([1.5, 1.0, -0.2]), position=2) == 1


def test_a_draw_depends_on_seed_and_position_only():
    row = torch.zeros(1000)
    first = sampler(vocabulary=1000, seed=5)
    again = sampler(vocabulary=1000, seed=5)
    other = sampler(vocabulary=1000, seed=6)
    first.choose(row, position=3)  # history does not matter
    tokens = [chooser.choose(row, position=9) for chooser in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert again.choose(row, position=10) != tokens[0]
