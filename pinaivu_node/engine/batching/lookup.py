"""Guesses at an answer's next tokens, taken from what it says already (prompt lookup decoding).

Answers repeat: names, quoted code, the keys of a list of JSON objects.  Where the last tokens have
stood before, what followed then is a fair guess at what follows now.  A step that computes a guess
beside the next token reads the weights once for all of them, and a guess that was right is a step
saved.  What is drawn does not change: each token is drawn from its own logits, with its own noise,
and a guess that it does not equal is dropped (A. Saxena, "Prompt Lookup Decoding", 2023; the idea
of checking guesses in one pass is Leviathan et al., "Fast Inference from Transformers via
Speculative Decoding", 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_LENGTHS: Final = (3, 2)
"""Tokens that must have stood before; the longer match is the better guess."""
_FIRST_TRUST: Final = 0.5
"""Share of the longest guess that is made before any was judged.  With less, short matches do not
count any more."""
_LONGEST_PAUSE: Final = 32
"""Tokens without a guess after many that were wrong: an answer that begins to repeat late is found
out within so many."""


class PromptLookup:
    """Guesses for one answer."""

    def __init__(self, tokens: Sequence[int]) -> None:
        """`tokens` is the answer's own list, prompt first, which grows."""
        self._tokens = tokens
        self._followed: dict[tuple[int, ...], int] = {}
        """Where the token is that came after these, the last time they stood there."""
        self._indexed = 0
        self._trust = _FIRST_TRUST
        self._pause = 0
        self._rest_until = 0

    def guess(self, most: int) -> list[int]:
        """At most so many tokens that may come next; none if nothing like it was said before."""
        self._index()
        if most <= 0 or len(self._tokens) < self._rest_until:
            return []
        for length in _LENGTHS:
            if length < _LENGTHS[0] and self._trust < _FIRST_TRUST:
                break
            start = self._followed.get(tuple(self._tokens[-length:]))
            if start is not None:
                return list(self._tokens[start : start + max(1, round(most * self._trust))])
        return []

    def judge(self, *, guessed: int, right: int) -> None:
        """So many tokens were guessed, and the first so many of them came."""
        all_right = right == guessed
        self._trust = 1.0 if all_right else max(0.1, (self._trust + right / guessed) / 2)
        if right:
            self._pause = 0
            return
        self._pause = min(max(1, 2 * self._pause), _LONGEST_PAUSE)
        self._rest_until = len(self._tokens) + self._pause

    def _index(self) -> None:
        tokens = self._tokens
        for place in range(max(self._indexed, 1), len(tokens)):
            for length in _LENGTHS:
                if place >= length:
                    self._followed[tuple(tokens[place - length : place])] = place
        self._indexed = len(tokens)
