"""Sampling on a GPU.  Skipped, and says so, where there is none."""

from __future__ import annotations

import random

import pytest
import torch

from pinaivu_node.engine.sampling.sampler import Draw, SequenceSampling, choose
from pinaivu_node.engine.types import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
VOCABULARY = 49_152


def some_draw(dice: random.Random) -> Draw:
    params = SamplingParams(
        max_tokens=1,
        temperature=dice.choice([0.0, 0.3, 0.8, 1.0, 1.7]),
        top_p=dice.choice([0.0, 0.5, 0.95, 1.0, 1.0]),
        top_k=dice.choice([0, 0, 1, 50, 5000]),
        min_p=dice.choice([0.0, 0.0, 0.05, 1.0]),
        presence_penalty=dice.choice([0.0, 0.5]),
        frequency_penalty=dice.choice([0.0, -0.3]),
        repetition_penalty=dice.choice([1.0, 1.2]),
        logit_bias={dice.randrange(VOCABULARY): dice.uniform(-9, 9) for _ in range(5)},
        logprobs=dice.choice([None, 0, 20]),
    )
    state = SequenceSampling(
        params,
        seed=dice.randrange(2**64),
        prompt=[dice.randrange(VOCABULARY) for _ in range(500)],
        answer=[dice.randrange(VOCABULARY) for _ in range(100)],
        vocabulary=VOCABULARY,
        device=torch.device("cuda"),
    )
    allowed = None
    if dice.random() < 0.3:
        words = [dice.randrange(-(2**31), 2**31) for _ in range(VOCABULARY // 32)]
        allowed = torch.tensor(words, dtype=torch.int32)
    return Draw(state, dice.randrange(2**20), allowed)


@pytest.mark.parametrize("number", range(30))
def test_a_gpu_chooses_what_a_cpu_chooses_to_the_last_bit_of_a_logprob(number):
    dice = random.Random(number)
    batch = [some_draw(dice) for _ in range(32)]
    generator = torch.Generator().manual_seed(number)
    logits = torch.randn(32, VOCABULARY, generator=generator) * dice.choice([0, 1, 4])
    expected = choose(logits, batch)
    there = logits.cuda()
    assert choose(there, batch) == expected
    order = dice.sample(range(32), 7)
    assert choose(there[order], [batch[i] for i in order]) == [expected[i] for i in order]
