"""Random walks under constraints over a real vocabulary."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from real_models import installed

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from walks import CHOICES, REGEXES, SCHEMAS, Walker, choice, regex, schema

pytestmark = pytest.mark.live


@pytest.fixture(scope="module", params=[("smollm2:135m", 49_152), ("gemma3:270m", 262_144)])
def walker(request):
    from transformers import AutoTokenizer

    name, vocabulary = request.param
    folder = installed(name).folder
    return Walker(AutoTokenizer.from_pretrained(folder), vocabulary=vocabulary)


@pytest.mark.parametrize(
    "constraint",
    [*map(schema, SCHEMAS.values()), *map(regex, REGEXES), *(choice(*words) for words in CHOICES)],
    ids=lambda constraint: constraint.text[:40],
)
def test_whatever_is_written_under_a_constraint_matches_it(walker, constraint):
    for seed in range(6):
        walker.walk(constraint, random.Random(seed), steps=120)
