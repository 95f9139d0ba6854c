from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.engine.batching.lookup import PromptLookup


def test_what_followed_before_is_guessed_again():
    tokens = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    lookup = PromptLookup(tokens)
    assert lookup.guess(4) == [4, 5], "half of what it may, at first"
    lookup.judge(guessed=2, right=2)
    assert lookup.guess(3) == [4, 5, 6]


def test_the_last_place_counts_and_the_longer_match_first():
    assert PromptLookup([1, 2, 7, 1, 2, 8, 1, 2]).guess(1) == [8]
    assert PromptLookup([5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2]).guess(1) == [7]


def test_what_was_never_said_is_not_guessed():
    assert PromptLookup([]).guess(5) == []
    assert PromptLookup([1]).guess(5) == []
    assert PromptLookup([1, 2, 3, 4]).guess(5) == []
    assert PromptLookup([1, 2, 1, 2]).guess(0) == []


def test_guesses_that_are_wrong_become_rare_and_short_and_come_back_when_right():
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    lookup = PromptLookup(tokens)
    made = 0
    for _ in range(200):
        tokens += [1, 2, 3]
        if guess := lookup.guess(8):
            made += 1
            lookup.judge(guessed=len(guess), right=0)
    assert 5 < made < 30
    tokens += range(100, 140)
    tokens += [100, 101]
    assert lookup.guess(8) == [], "two tokens are too short a match for one that was wrong so often"
    tokens.append(102)
    assert lookup.guess(8) == [103]
    lookup.judge(guessed=1, right=1)
    assert lookup.guess(8) == list(range(103, 111))


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 10))
def test_a_guess_is_a_piece_of_what_was_said(tokens, most):
    guess = PromptLookup(tokens).guess(most)
    assert len(guess) <= most
    said = ",".join(map(str, tokens))
    assert ",".join(map(str, guess)) in said
