"""Elementary functions that LLVM can vectorise; the C library's are called one number at a time."""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

ZERO: Final = np.float32(0)
ONE: Final = np.float32(1)
TWO: Final = np.float32(2)
HALF: Final = np.float32(0.5)
MINUS_INFINITY: Final = np.float32(-np.inf)

_LOG2_E: Final = np.float32(1.4426950408889634)
# ln 2 in two parts, the first with so few bits that its product with a small integer is exact.
_LN2_HIGH: Final = np.float32(0.693359375)
_LN2_LOW: Final = np.float32(-2.12194440e-4)
_LOWEST: Final = np.float32(-87.0)
_HIGHEST: Final = np.float32(88.0)
# Minimax polynomial of exp on ±ln 2 / 2, from Cephes (Moshier): 2⁻²³ relative error.
_C1: Final = np.float32(1.9875691500e-4)
_C2: Final = np.float32(1.3981999507e-3)
_C3: Final = np.float32(8.3334519073e-3)
_C4: Final = np.float32(4.1665795894e-2)
_C5: Final = np.float32(1.6666665459e-1)
_C6: Final = np.float32(5.0000001201e-1)


@njit(inline="always")
def exponential(x):
    """E to the power x, x clamped to −87…88."""
    x = min(max(x, _LOWEST), _HIGHEST)
    n = np.floor(x * _LOG2_E + HALF)
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = _C1
    p = p * r + _C2
    p = p * r + _C3
    p = p * r + _C4
    p = p * r + _C5
    p = p * r + _C6
    p = p * (r * r) + r + ONE
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return p * power.view(np.float32)


@njit(inline="always")
def sigmoid(x):
    """1 / (1 + e⁻ˣ)."""
    return ONE / (ONE + exponential(-x))


@njit(inline="always")
def tanh(x):
    """Hyperbolic tangent."""
    return ONE - TWO / (exponential(TWO * x) + ONE)
