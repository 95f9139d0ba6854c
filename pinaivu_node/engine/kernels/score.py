"""The numbers of one token in a draw: its score, its key, its weight and its noise.

These are part of the definition of a draw, which an auditor of next year must be able to redo, so
they share no polynomial with the layers: those may change.  `tensor_draw.py` has them over tensors.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-any-return"

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import njit

from pinaivu_node.engine.sampling import noise

INFINITE_KEY: Final = 0x7F800000
"""The key of a token that cannot be chosen."""
WEIGHT_BITS: Final = 40
"""A vocabulary of 2²² tokens may each weigh the most there is; the sum still fits 63 bits."""

ZERO: Final = np.float32(0)
MAGNITUDE: Final = np.int32(0x7FFFFFFF)
LOG2_E: Final = np.float32(1.4426950408889634)
# ln 2 in two parts, the first with so few bits that its product with a small integer is exact.
LN2_HIGH: Final = np.float32(0.693359375)
LN2_LOW: Final = np.float32(-2.12194440e-4)
LOWEST: Final = np.float32(-87.0)
C1: Final = np.float32(1.9875691500e-4)
C2: Final = np.float32(1.3981999507e-3)
C3: Final = np.float32(8.3334519073e-3)
C4: Final = np.float32(4.1665795894e-2)
C5: Final = np.float32(1.6666665459e-1)
C6: Final = np.float32(5.0000001201e-1)
"""Minimax polynomial of exp on ±ln 2 / 2, from Cephes (Moshier): 2⁻²³ relative error."""

_HALF: Final = np.float32(0.5)
_ONE: Final = np.float32(1)
_MANTISSA: Final = np.int32(0x7FFFFF)
_LEADING_ONE: Final = np.int32(0x800000)
_GOLDEN: Final = np.uint64(noise.GOLDEN)
_MIX_1: Final = np.uint64(noise.MIX_1)
_MIX_2: Final = np.uint64(noise.MIX_2)
_GRID: Final = 2.0**-53


@njit(inline="always")
def ordered(x):
    """Integers in the order of the floats, NaNs beyond the infinities; its own inverse on bits."""
    bits = np.float32(x + ZERO).view(np.int32)  # −0 becomes +0
    flip = np.int32(np.int32(bits >> np.int32(31)) & MAGNITUDE)
    return np.int32(bits ^ flip)


@njit(inline="always")
def unordered(rank):
    """The float with this place in the order."""
    flip = np.int32(np.int32(rank >> np.int32(31)) & MAGNITUDE)
    return np.int32(rank ^ flip).view(np.float32)


@njit(inline="always")
def score_of(x, top, temperature):
    """0 for the likeliest, negative for others."""
    return np.float32(np.float32(x - top) / temperature)


@njit(inline="always")
def key_of(score):
    """Ascending where scores descend."""
    return np.int32(np.float32(score).view(np.int32) & MAGNITUDE)


@njit(inline="always")
def exponential(score):
    """Exp of a score, of −87 if it is less; every operation rounded, none fused."""
    x = max(score, LOWEST)
    n = np.floor(x * LOG2_E + _HALF)
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    p = C1
    p = p * r + C2
    p = p * r + C3
    p = p * r + C4
    p = p * r + C5
    p = p * r + C6
    p = p * (r * r) + r + _ONE
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return p * power.view(np.float32)


@njit(inline="always")
def whole(x):
    """A float of at most 1 in whole 2⁻⁴⁰, rounded down."""
    bits = np.float32(x).view(np.int32)
    mantissa = np.int64(np.int32(np.int32(bits & _MANTISSA) | _LEADING_ONE))
    shift = np.int64(np.int32(np.int32(127) - np.int32(bits >> np.int32(23))))
    return (mantissa << np.int64(WEIGHT_BITS - 23)) >> min(shift, np.int64(63))


@njit(inline="always")
def weight_of(score):
    """Exp of a score in whole 2⁻⁴⁰, rounded down."""
    return whole(exponential(score))


@njit(inline="always")
def hashed(stream, token):
    """The 64 bits that `noise.uniform` makes its number of."""
    x = stream + (np.uint64(token) + np.uint64(1)) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@njit(inline="always")
def gumbel(stream, token):
    """The noise that is added to a token's score; −3.7 to 37.5."""
    u = (np.float64(hashed(stream, token) >> np.uint64(11)) + 0.5) * _GRID
    return -math.log(-math.log(u))
