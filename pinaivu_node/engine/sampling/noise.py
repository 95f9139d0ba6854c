"""Randomness that belongs to a place in a text, not to a run: pure integers.

The noise of a token is a hash of (seed, position, token id).  So a text does not depend on what
else the engine does at the time, an interrupted answer goes on elsewhere as if nothing had
happened, and an auditor can redo every draw.  The generator is SplitMix64: `stream` names one of
2⁶⁴ streams, and the noise of a token is that stream's output number `token_id`.  `sampler.py`
computes the same for a whole vocabulary at once; this is the definition that it is tested against.
"""

from __future__ import annotations

from typing import Final

MASK: Final = 2**64 - 1
GOLDEN: Final = 0x9E3779B97F4A7C15
MIX_1: Final = 0xBF58476D1CE4E5B9
MIX_2: Final = 0x94D049BB133111EB


def mix(x: int) -> int:
    """SplitMix64's finaliser: every input bit changes every output bit with probability half."""
    x = ((x ^ (x >> 30)) * MIX_1) & MASK
    x = ((x ^ (x >> 27)) * MIX_2) & MASK
    return x ^ (x >> 31)


def stream(seed: int, position: int) -> int:
    """The stream of the token at this position (counted from the start of the prompt)."""
    return mix((mix(seed & MASK) + (position + 1) * GOLDEN) & MASK)


def uniform(stream: int, token_id: int) -> float:
    """A number strictly between 0 and 1, on a grid of 2⁻⁵³."""
    bits = mix((stream + (token_id + 1) * GOLDEN) & MASK)
    return ((bits >> 11) + 0.5) * 2.0**-53


def answer_seed(seed: int, index: int) -> int:
    """The seed of the answer with this index, of several to one prompt; the first keeps its own."""
    return seed if index == 0 else mix((seed + index * MIX_1) & MASK)
