from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_node.engine.kernels import cut
from pinaivu_node.engine.kernels import score as definition
from pinaivu_node.engine.sampling import noise, sampler, tensor_draw
from pinaivu_node.engine.sampling.sampler import Broken, Chosen, Draw, SequenceSampling, choose
from pinaivu_node.engine.sampling.tensor_draw import uniform_noise
from pinaivu_node.engine.types import SamplingParams

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # The kernel is compiled, or read from the disk, before anything is timed.
    choose(torch.zeros(1, 8), [Draw(state(), 0)])
    yield
    torch.set_num_threads(before)


def state(*, prompt=(), answer=(), vocabulary=8, **params) -> SequenceSampling:
    return SequenceSampling(
        SamplingParams(max_tokens=1, **params),
        seed=params.get("seed", 0),
        prompt=prompt,
        answer=answer,
        vocabulary=vocabulary,
        device=CPU,
    )


def by_tensors(logits: torch.Tensor, draws: list[Draw]) -> list[Chosen | Broken]:
    """What `choose` does on a GPU, on the CPU."""
    wholes, reals = sampler._by_tensors(logits, draws)
    return [
        sampler._outcome(draw, whole, real)
        for draw, whole, real in zip(draws, wholes, reals, strict=True)
    ]


WAYS = pytest.mark.parametrize("way", [choose, by_tensors], ids=["kernel", "tensors"])


def draws(logits, count=2000, **params) -> list[int]:
    """The tokens at so many positions, all from one row of logits."""
    one = state(vocabulary=len(logits), **params)
    rows = torch.tensor(logits).repeat(count, 1)
    chosen = choose(rows, [Draw(one, position) for position in range(count)])
    return [each.token_id for each in chosen]


def mask_of(allowed, vocabulary: int) -> torch.Tensor:
    words = [0] * ((vocabulary + 31) // 32)
    for token in allowed:
        words[token // 32] |= 1 << (token % 32)
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


# --- the definition, in plain Python ------------------------------------------------------------


def rounded(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).float().item()


def plain(logits: list[float], draw: Draw, *, prompt=(), answer=()) -> int | None:
    """The definition that `sampler.py` opens with, step by step; exact but for ties in weight."""
    params = draw.state.params
    adjusted = {
        token: plainly_adjusted(token, x, params, prompt=prompt, answer=answer)
        for token, x in enumerate(logits)
        if is_allowed(token, draw.allowed)
    }
    row = {token: x for token, x in adjusted.items() if x > -math.inf}
    if not row:
        return None
    top = max(row.values())
    if params.temperature < 1e-4:
        return min(token for token, x in row.items() if x == top)
    temperature = rounded(params.temperature)
    scores = {token: rounded(rounded(x - top) / temperature) for token, x in row.items()}
    order = sorted(scores, key=lambda token: (-scores[token], token))
    order = plainly_cut(order, scores, params)
    stream = noise.stream(draw.state.seed, draw.position)
    return max(
        order,
        key=lambda t: (scores[t] - math.log(-math.log(noise.uniform(stream, t))), -t),
    )


def is_allowed(token: int, words: torch.Tensor | None) -> bool:
    if words is None:
        return True
    return token < 32 * len(words) and bool(int(words[token // 32]) >> token % 32 & 1)


def plainly_adjusted(token: int, logit: float, params: SamplingParams, *, prompt, answer) -> float:
    x = rounded(logit + rounded(params.logit_bias.get(token, 0.0)))
    if token in prompt or token in answer:
        factor = rounded(params.repetition_penalty)
        x = rounded(x / factor if x > 0 else x * factor)
    count = list(answer).count(token)
    x = rounded(x - rounded(rounded(params.frequency_penalty) * count))
    return rounded(x - rounded(params.presence_penalty)) if count else x


def plainly_cut(order: list[int], scores: dict[int, float], params: SamplingParams) -> list[int]:
    left = order[: params.top_k] if params.top_k else order
    if params.top_p < 1:
        total, held = sum(math.exp(scores[token]) for token in left), 0.0
        for place, token in enumerate(left):
            if place and held >= params.top_p * total:
                left = left[:place]
                break
            held += math.exp(scores[token])
    least = rounded(math.log(params.min_p)) if params.min_p else -math.inf
    return [token for token in left if scores[token] >= least]


def some_params(dice: random.Random, vocabulary: int) -> dict:
    """Settings of one request: each present about as often as not."""

    def either(value, otherwise):
        return value if dice.random() < 0.4 else otherwise

    return {
        "temperature": dice.choice([0.0, 0.3, 0.8, 1.0, 1.7]),
        "top_p": either(dice.choice([0.0, 0.1, 0.5, 0.9, 0.95, 0.999]), 1.0),
        "top_k": either(dice.choice([1, 2, 17, 50, 300, 10**9]), 0),
        "min_p": either(dice.choice([0.001, 0.05, 0.5, 1.0]), 0.0),
        "presence_penalty": either(dice.uniform(-2, 2), 0.0),
        "frequency_penalty": either(dice.uniform(-2, 2), 0.0),
        "repetition_penalty": either(dice.uniform(0.5, 2), 1.0),
        "logit_bias": either(
            {dice.randrange(vocabulary): dice.uniform(-100, 100) for _ in range(9)}, {}
        ),
        "seed": dice.randrange(-(2**70), 2**70),
        "logprobs": dice.choice([None, 0, 1, 5, 20]),
    }


def some_draw(dice: random.Random, vocabulary: int) -> tuple[Draw, list[int], list[int]]:
    prompt = [dice.randrange(vocabulary) for _ in range(dice.randrange(60))]
    answer = [dice.randrange(vocabulary) for _ in range(dice.randrange(60))]
    one = state(
        prompt=prompt, answer=answer, vocabulary=vocabulary, **some_params(dice, vocabulary)
    )
    allowed = None
    if dice.random() < 0.3:
        count = dice.choice([0, 1, 5, vocabulary])
        allowed = mask_of([dice.randrange(vocabulary) for _ in range(count)], vocabulary)
    return Draw(one, dice.randrange(2**20), allowed), prompt, answer


def some_logits(dice: random.Random, rows: int, vocabulary: int) -> torch.Tensor:
    """Rows peaked, flat, full of ties, and rows with impossible tokens."""
    generator = torch.Generator().manual_seed(dice.randrange(2**60))
    logits = torch.randn(rows, vocabulary, generator=generator)
    for i in range(rows):
        row = logits[i]
        match dice.randrange(5):
            case 0:
                row.mul_(5)
            case 1:
                row.mul_(2).round_()
            case 2:
                row.zero_()
            case 3:
                row[torch.rand(vocabulary, generator=generator) < 0.5] = -math.inf
            case _:
                row.add_(30 * (torch.rand(vocabulary, generator=generator) < 3 / vocabulary))
    return logits


@pytest.mark.parametrize("number", range(60))
def test_kernel_and_tensors_choose_alike_to_the_last_bit_of_a_logprob(number):
    dice = random.Random(number)
    vocabulary = dice.choice([1, 2, 31, 32, 33, 63, 64, 65, 100, 1000, 3001])
    batch = [some_draw(dice, vocabulary)[0] for _ in range(50)]
    logits = some_logits(dice, len(batch), vocabulary)
    before = logits.clone()
    assert choose(logits, batch) == by_tensors(logits, batch)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("number", range(40))
def test_kernel_and_tensors_choose_what_the_definition_says(number):
    dice = random.Random(1000 + number)
    vocabulary = dice.choice([1, 5, 33, 64, 150])
    batch = [some_draw(dice, vocabulary) for _ in range(20)]
    logits = some_logits(dice, len(batch), vocabulary)
    # Ties in weight are cut by whole numbers there and by sums of floats here: none of them.
    logits = torch.where(logits == logits.round(), logits + torch.rand_like(logits), logits)
    expected = [
        plain(row.tolist(), draw, prompt=prompt, answer=answer)
        for row, (draw, prompt, answer) in zip(logits, batch, strict=True)
    ]
    for way in (choose, by_tensors):
        got = way(logits, [draw for draw, _, _ in batch])
        assert [each.token_id if isinstance(each, Chosen) else None for each in got] == expected


@WAYS
@pytest.mark.parametrize("number", range(15))
def test_a_row_is_drawn_as_if_it_were_alone(way, number):
    dice = random.Random(2000 + number)
    vocabulary = dice.choice([40, 64, 999, 5000])
    batch = [some_draw(dice, vocabulary)[0] for _ in range(24)]
    logits = some_logits(dice, len(batch), vocabulary)
    alone = [way(logits[i : i + 1].clone(), [draw])[0] for i, draw in enumerate(batch)]
    assert way(logits, batch) == alone  # logprobs, too, and to the bit
    for _ in range(4):
        order = dice.sample(range(len(batch)), dice.randrange(1, len(batch)))
        mixed = way(logits[order], [batch[i] for i in order])
        assert mixed == [alone[i] for i in order]


# --- noise and weights ---------------------------------------------------------------------------


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**31), st.integers(0, 2**20))
def test_the_noise_of_a_vocabulary_is_the_defined_one_to_the_bit(seed, position, token_id):
    stream = noise.stream(seed, position)
    streams = torch.tensor([tensor_draw.signed(stream)])
    assert uniform_noise(streams, torch.tensor([token_id])).item() == noise.uniform(
        stream, token_id
    )


def test_the_noise_never_changes():
    # An auditor of next year must redo today's draws.
    assert noise.stream(0, 0) == 0xE220A8397B1DCDAF
    assert [noise.uniform(noise.stream(42, 7), token) for token in (0, 1, 49151)] == [
        0.8130366761818051,
        0.9134455418061547,
        0.24557575705380624,
    ]


def test_noise_is_uniform():
    stream = torch.tensor([tensor_draw.signed(noise.stream(1, 2))])
    numbers = uniform_noise(stream, torch.arange(100_000))
    counts = torch.histc(numbers, bins=10, min=0, max=1)
    # 10,000 in each, standard deviation 95: five of them.
    assert (counts - 10_000).abs().max() < 475
    assert numbers.min() > 0
    assert numbers.max() < 1


@given(st.floats(-120, 0, width=32))
@settings(max_examples=300)
def test_weights_are_exponentials_and_the_same_in_kernel_and_tensors(score):
    weight = int(tensor_draw.weight(torch.tensor([score])))
    exact = math.exp(max(score, -87.0)) * 2**40
    assert abs(weight - exact) <= exact * 2.0**-22 + 1
    assert _weight_of(score) == weight


def _weight_of(score: float) -> int:
    """By the kernel: what a second token adds to the first one's 2⁴⁰."""
    row = torch.tensor([[0.0, score]])
    room = torch.empty(2)
    scale = (np.float32(0), np.float32(1))
    both = cut.mass(row.data_ptr(), 2, scale, room.data_ptr())
    return both - 2**definition.WEIGHT_BITS


# --- what each setting does ----------------------------------------------------------------------


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_first():
    assert set(draws([0.0, 3.0, 2.9], temperature=0.0, count=20)) == {1}
    assert set(draws([0.0, 3.0, 2.9], temperature=1e-9, count=20)) == {1}
    assert set(draws([0.0, 3.0, 3.0], temperature=math.nan, count=20)) == {1}
    assert set(draws([-0.0, 0.0, -1.0], temperature=0.0, count=1)) == {0}


CRITICAL = {4: 30.7, 9: 42.8, 10: 44.9, 40: 96.2, 500: 663.9}
"""Chi-square of so many cells less one that chance exceeds once in 10⁶ times; 3 to 499 degrees."""


def chi_square(chosen: list[int], probabilities: list[float]) -> float:
    expected = [p * len(chosen) for p in probabilities]
    assert min(expected) >= 5
    return sum((chosen.count(i) - e) ** 2 / e for i, e in enumerate(expected))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.9])
@pytest.mark.parametrize("size", [4, 9, 40])
def test_draws_follow_the_distribution(temperature, size):
    logits = [1.2 * math.sin(5.0 * i) for i in range(size)]
    weights = [math.exp(x / temperature) for x in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    for seed in (1, 2):
        chosen = draws(logits, count=12_000, temperature=temperature, seed=seed)
        assert chi_square(chosen, probabilities) < CRITICAL[size]


def test_draws_across_seeds_follow_the_distribution_as_draws_across_positions_do():
    logits = torch.tensor([math.log(p) for p in (0.5, 0.3, 0.15, 0.05)])
    batch = [Draw(state(vocabulary=4, seed=seed), 7) for seed in range(8000)]
    chosen = [each.token_id for each in choose(logits.repeat(8000, 1), batch)]
    assert chi_square(chosen, [0.5, 0.3, 0.15, 0.05]) < CRITICAL[4]


def test_draws_of_a_flat_vocabulary_follow_the_distribution():
    chosen = draws([0.0] * 500, count=20_000)
    assert chi_square(chosen, [1 / 500] * 500) < CRITICAL[500]


def test_draws_within_a_nucleus_follow_the_distribution_that_is_left():
    logits = [math.log(p) for p in (0.1, 0.4, 0.06, 0.3, 0.14)]
    chosen = draws(logits, count=20_000, top_p=0.9)
    assert 2 not in chosen
    renamed = [{0: 3, 1: 0, 3: 1, 4: 2}[token] for token in chosen]
    assert chi_square(renamed, [p / 0.94 for p in (0.4, 0.3, 0.14, 0.1)]) < CRITICAL[4]


def test_a_nucleus_draws_the_same_token_as_the_whole_vocabulary():
    row = (torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 4).tolist()
    whole, part = draws(row, count=100, seed=3), draws(row, count=100, seed=3, top_p=0.999999)
    same = [one == other for one, other in zip(whole, part, strict=True)]
    assert sum(same) >= 99  # a token outside the nucleus comes once in a million


def test_top_k_leaves_k_tokens():
    assert set(draws([1.0, 1.2, 0.9, 1.1], top_k=2)) == {1, 3}
    assert set(draws([1.0, 1.2], top_k=1, count=50)) == {1}
    assert set(draws([1.0] * 700, top_k=3)) == {0, 1, 2}
    assert draws([1.0, 1.2, 0.9], top_k=10**30) == draws([1.0, 1.2, 0.9])


def test_top_p_leaves_the_fewest_tokens_that_hold_it():
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert set(draws(logits, top_p=0.6)) == {0, 1}
    assert set(draws(logits, top_p=0.71)) == {0, 1, 2}
    assert set(draws(logits, top_p=0.0, count=50)) == {0}
    assert set(draws(logits, top_p=0.999999)) == {0, 1, 2, 3}


def test_top_p_is_of_what_top_k_left():
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert set(draws(logits, top_p=0.5)) == {0, 1}
    assert set(draws(logits, top_k=2, top_p=0.5)) == {0}


def test_equally_likely_tokens_are_cut_by_their_ids():
    chosen = draws([0.0] * 4000, top_p=0.75, count=3000)
    assert max(chosen) < 3000
    assert max(chosen) > 2900
    assert chi_square([token // 300 for token in chosen], [0.1] * 10) < CRITICAL[10]


def test_min_p_is_relative_to_the_likeliest():
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draws(logits, min_p=0.29)) == {0, 1, 2}
    assert set(draws([1.0, 2.0, 2.0], min_p=1.0, count=50)) == {1, 2}


@WAYS
def test_biases_move_tokens_and_unknown_ones_do_not_matter(way):
    bias = {0: 5.0, 99: 3.0, -1: 100.0, 2**80: 100.0}
    row = torch.tensor([[0.0, 1.0]])
    one = state(vocabulary=2, temperature=0.0, logit_bias=bias)
    assert way(row, [Draw(one, 0)]) == [Chosen(0)]
    assert set(draws([9.0, 0.0], logit_bias={0: -100.0}, count=50)) == {1}


@WAYS
@pytest.mark.parametrize("params", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}])
def test_presence_and_frequency_count_what_was_answered(way, params):
    one = state(vocabulary=2, prompt=[0, 0, 0], temperature=0.0, **params)
    row = torch.tensor([[1.0, 0.0]])
    assert way(row, [Draw(one, 1)]) == [Chosen(0)]
    one.observe(0)
    assert way(row, [Draw(one, 2)]) == [Chosen(1)]


@WAYS
def test_the_repetition_penalty_counts_the_prompt_too(way):
    one = state(vocabulary=3, prompt=[0, 2, -5, 10**20], temperature=0.0, repetition_penalty=2.0)
    row = torch.tensor([[1.5, 1.0, -0.2]])
    assert way(row, [Draw(one, 2)]) == [Chosen(1)]
    one.observe(1)
    assert way(row, [Draw(one, 3)]) == [Chosen(0)]


@WAYS
def test_a_resumed_answer_is_penalised_as_if_it_had_never_stopped(way):
    params = {"frequency_penalty": 0.7, "presence_penalty": 0.1, "repetition_penalty": 1.3}
    dice = random.Random(5)
    answer = [dice.randrange(300) for _ in range(400)]
    observed = state(vocabulary=300, prompt=[1, 2], **params)
    for token_id in answer:
        observed.observe(token_id)
    resumed = state(vocabulary=300, prompt=[1, 2], answer=answer, **params)
    rows = torch.randn(200, 300, generator=torch.Generator().manual_seed(5))
    one = way(rows, [Draw(observed, position) for position in range(200)])
    assert one == way(rows, [Draw(resumed, position) for position in range(200)])


@WAYS
def test_huge_counts_are_still_numbers(way):
    one = state(vocabulary=4, frequency_penalty=2.0, answer=[1] * 100_000)
    assert way(torch.zeros(1, 4), [Draw(one, 0)]) != [Chosen(1)]
    drawn_in = state(vocabulary=4, frequency_penalty=-2.0, answer=[1] * 100_000)
    assert way(torch.zeros(1, 4), [Draw(drawn_in, 0)]) == [Chosen(1)]


def test_a_draw_depends_on_seed_and_position_only():
    row = torch.zeros(1, 1000)
    first, again, other = (state(vocabulary=1000, seed=seed) for seed in (5, 5, 6))
    choose(row, [Draw(first, 3)])  # history does not matter
    tokens = [choose(row, [Draw(each, 9)]) for each in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert choose(row, [Draw(again, 10)]) != tokens[0]


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5, -(2**200), 3**500])
def test_any_integer_is_a_seed(seed):
    expected = draws([0.0] * 99, count=20, seed=seed % 2**64)
    assert draws([0.0] * 99, count=20, seed=seed) == expected


# --- constraints ---------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_chosen(way, temperature):
    rows = torch.randn(300, 100, generator=torch.Generator().manual_seed(1))
    one = state(vocabulary=100, temperature=temperature)
    allowed = {3, 31, 32, 63, 99}
    mask = mask_of(allowed, 100)
    chosen = way(rows, [Draw(one, position, mask) for position in range(300)])
    assert {each.token_id for each in chosen} == allowed


@WAYS
def test_a_token_without_a_bit_is_not_allowed(way):
    row = torch.zeros(1, 100)
    row[0, 90] = 50
    short = torch.full((2,), -1, dtype=torch.int32)
    (chosen,) = way(row, [Draw(state(vocabulary=100), 0, short)])
    assert chosen.token_id < 64


@WAYS
def test_bits_beyond_the_vocabulary_mean_nothing(way):
    long = torch.full((9,), -1, dtype=torch.int32)
    one = state(vocabulary=5)
    row = torch.zeros(1, 5)
    assert way(row, [Draw(one, 0, long)]) == way(row, [Draw(one, 0)])


@WAYS
def test_a_constraint_that_allows_nothing_breaks_its_row_alone(way):
    rows = torch.randn(3, 70, generator=torch.Generator().manual_seed(1))
    one = state(vocabulary=70)
    nothing = torch.zeros(3, dtype=torch.int32)
    outcome = way(rows, [Draw(one, 0), Draw(one, 0, nothing), Draw(one, 0)])
    assert outcome[1] == Broken("The constraint allows no token that is possible here.")
    assert outcome[::2] == way(rows[::2], [Draw(one, 0)] * 2)


# --- broken models -------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"logprobs": 3}])
def test_a_row_that_is_not_numbers_breaks_alone(way, wrong, params):
    rows = torch.randn(70, 70, generator=torch.Generator().manual_seed(1))
    good = way(rows, [Draw(state(vocabulary=70, **params), i) for i in range(70)])
    for i in range(0, 70, 3):
        rows[i, i] = wrong
    outcome = way(rows, [Draw(state(vocabulary=70, **params), i) for i in range(70)])
    for i, each in enumerate(outcome):
        assert each == (good[i] if i % 3 else Broken("The model's logits are not numbers."))


@WAYS
def test_a_bad_number_is_noticed_behind_a_mask_too(way):
    row = torch.zeros(1, 40)
    row[0, 7] = -math.nan
    outcome = way(row, [Draw(state(vocabulary=40), 0, mask_of({3}, 40))])
    assert outcome == [Broken("The model's logits are not numbers.")]


@WAYS
def test_an_overflowing_penalty_breaks_its_row(way):
    one = state(vocabulary=2, repetition_penalty=1e-6, prompt=[1])
    outcome = way(torch.tensor([[0.0, 3e38]]), [Draw(one, 0)])
    assert outcome == [Broken("The model's logits are not numbers.")]


@WAYS
def test_minus_infinity_is_an_impossible_token(way):
    rows = torch.zeros(200, 3)
    rows[:, 1] = -math.inf
    one = state(vocabulary=3, logprobs=5, top_k=3)
    outcome = way(rows, [Draw(one, i) for i in range(200)])
    assert {each.token_id for each in outcome} == {0, 2}
    assert {token for token, _ in outcome[0].top} == {0, 2}
    nothing = way(torch.full((1, 3), -math.inf), [Draw(one, 0)])
    assert nothing == [Broken("The model says that no token is possible.")]


@WAYS
def test_the_largest_numbers_there_are_do_no_harm(way):
    rows = torch.tensor([[3e38, -3e38, 3e38], [1e-45, 0.0, -1e-45]])
    for params in ({}, {"temperature": 1e-3}, {"top_p": 0.9}, {"top_k": 2}, {"logprobs": 2}):
        outcome = way(rows, [Draw(state(vocabulary=3, **params), i) for i in range(2)])
        assert outcome[0].token_id in (0, 2)


def test_a_caller_s_mistake_is_said():
    draw = Draw(state(vocabulary=3), 0)
    for logits in (torch.zeros(3), torch.zeros(2, 3), torch.zeros(1, 4), torch.zeros(1, 3).half()):
        with pytest.raises(ValueError, match=r"draws|logits"):
            choose(logits, [draw])
    with pytest.raises(ValueError, match="mask"):
        choose(torch.zeros(1, 3), [Draw(state(vocabulary=3), 0, torch.ones(1))])
    assert choose(torch.zeros(0, 3), []) == []


# --- logprobs ------------------------------------------------------------------------------------


@WAYS
def test_logprobs_are_of_the_model_s_own_distribution(way):
    rows = torch.randn(20, 3000, generator=torch.Generator().manual_seed(1)) * 4
    exact = rows.double().log_softmax(-1)
    one = state(
        vocabulary=3000, temperature=0.7, top_k=50, logit_bias={5: 9.0}, logprobs=20,
        repetition_penalty=1.5, prompt=range(100),
    )  # fmt: skip
    for i, each in enumerate(way(rows, [Draw(one, i) for i in range(20)])):
        assert each.logprob == pytest.approx(exact[i, each.token_id].item(), abs=1e-6)
        best = exact[i].topk(20)
        assert [token for token, _ in each.top] == best.indices.tolist()
        assert [logprob for _, logprob in each.top] == pytest.approx(best.values.tolist(), abs=1e-6)


@WAYS
def test_alternatives_are_as_many_as_asked_for_and_the_first_of_equals(way):
    rows = torch.zeros(4, 300)
    counts = (None, 0, 3, 20)
    batch = [Draw(state(vocabulary=300, logprobs=count), 0) for count in counts]
    outcome = way(rows, batch)
    assert outcome[0].logprob is None
    assert outcome[1].logprob == pytest.approx(-math.log(300), abs=1e-6)
    assert [[token for token, _ in each.top] for each in outcome] == [
        [], [], [0, 1, 2], list(range(20)),
    ]  # fmt: skip


@WAYS
def test_a_vocabulary_smaller_than_the_alternatives_is_reported_whole(way):
    (chosen,) = way(torch.tensor([[0.0, 1.0]]), [Draw(state(vocabulary=2, logprobs=20), 0)])
    assert [token for token, _ in chosen.top] == [1, 0]
    assert sum(math.exp(logprob) for _, logprob in chosen.top) == pytest.approx(1)
