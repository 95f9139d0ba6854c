"""RMS normalisation and gated activations over rows, each in one pass."""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from pinaivu_node.engine.kernels.arithmetic import HALF, ONE, ZERO, sigmoid, tanh
from pinaivu_node.engine.kernels.memory import KERNEL, bfloat16_at, float32_at, load, store

_CHAINS: Final = 4
_ROOT_2_OVER_PI: Final = np.float32(0.7978845608028654)
_CUBE: Final = np.float32(0.044715)


@njit(inline="always")
def row_scale(x, at, width, epsilon):
    """1 / root mean square of a row; the order of the sum depends on the width alone."""
    total = ZERO
    whole = width - width % _CHAINS
    s0 = s1 = s2 = s3 = ZERO
    # Four chains, so that an addition need not wait for the one before it.
    for i in range(0, whole, _CHAINS):
        a, b, c, d = load(x, at + i), load(x, at + i + 1), load(x, at + i + 2), load(x, at + i + 3)
        s0 += a * a
        s1 += b * b
        s2 += c * c
        s3 += d * d
    for i in range(whole, width):
        a = load(x, at + i)
        total += a * a
    total += (s0 + s1) + (s2 + s3)
    return ONE / np.sqrt(total / np.float32(width) + epsilon)


@njit(**KERNEL)
def _rms_norm(x, weight, out, rows, width, epsilon, offset):
    """Out = x / rms(x) · (offset + weight), row by row."""
    for row in range(rows):
        at = row * width
        scale = row_scale(x, at, width, np.float32(epsilon))
        for i in range(width):
            store(out, at + i, load(x, at + i) * scale * (np.float32(offset) + weight[i]))


@njit(**KERNEL)
def rms_norm_float32(x_at, weight_at, out_at, rows, width, epsilon, offset):
    """Out = x / rms(x) · (offset + weight) over [rows, width]; the weight is float32."""
    x, out = float32_at(x_at), float32_at(out_at)
    _rms_norm(x, float32_at(weight_at), out, rows, width, epsilon, offset)


@njit(**KERNEL)
def rms_norm_bfloat16(x_at, weight_at, out_at, rows, width, epsilon, offset):
    """As `rms_norm_float32`."""
    x, out = bfloat16_at(x_at), bfloat16_at(out_at)
    _rms_norm(x, float32_at(weight_at), out, rows, width, epsilon, offset)


@njit(**KERNEL)
def _add_rms_norm(x, addend, weight, out, rows, width, epsilon, offset):
    for row in range(rows):
        at = row * width
        for i in range(width):
            store(x, at + i, load(x, at + i) + load(addend, at + i))
        scale = row_scale(x, at, width, np.float32(epsilon))
        for i in range(width):
            store(out, at + i, load(x, at + i) * scale * (np.float32(offset) + weight[i]))


@njit(**KERNEL)
def add_rms_norm_float32(x_at, addend_at, weight_at, out_at, rows, width, epsilon, offset):
    """X += addend, then out = x / rms(x) · (offset + weight)."""
    x, addend, out = float32_at(x_at), float32_at(addend_at), float32_at(out_at)
    _add_rms_norm(x, addend, float32_at(weight_at), out, rows, width, epsilon, offset)


@njit(**KERNEL)
def add_rms_norm_bfloat16(x_at, addend_at, weight_at, out_at, rows, width, epsilon, offset):
    """As `add_rms_norm_float32`."""
    x, addend, out = bfloat16_at(x_at), bfloat16_at(addend_at), bfloat16_at(out_at)
    _add_rms_norm(x, addend, float32_at(weight_at), out, rows, width, epsilon, offset)


@njit(**KERNEL)
def _silu_gated(x, out, rows, width):
    for row in range(rows):
        gate, up, to = 2 * row * width, (2 * row + 1) * width, row * width
        for i in range(width):
            value = load(x, gate + i)
            store(out, to + i, value * sigmoid(value) * load(x, up + i))


@njit(**KERNEL)
def _gelu_gated(x, out, rows, width):
    for row in range(rows):
        gate, up, to = 2 * row * width, (2 * row + 1) * width, row * width
        for i in range(width):
            value = load(x, gate + i)
            bent = tanh(_ROOT_2_OVER_PI * (value + _CUBE * value * value * value))
            store(out, to + i, HALF * value * (ONE + bent) * load(x, up + i))


@njit(**KERNEL)
def silu_gated_float32(x_at, out_at, rows, width):
    """Out = silu(x[:, :width]) · x[:, width:], x being [rows, 2·width]."""
    _silu_gated(float32_at(x_at), float32_at(out_at), rows, width)


@njit(**KERNEL)
def silu_gated_bfloat16(x_at, out_at, rows, width):
    """As `silu_gated_float32`."""
    _silu_gated(bfloat16_at(x_at), bfloat16_at(out_at), rows, width)


@njit(**KERNEL)
def gelu_gated_float32(x_at, out_at, rows, width):
    """As `silu_gated_float32`, with the tanh form of GELU (Hendrycks and Gimpel, 2016)."""
    _gelu_gated(float32_at(x_at), float32_at(out_at), rows, width)


@njit(**KERNEL)
def gelu_gated_bfloat16(x_at, out_at, rows, width):
    """As `gelu_gated_float32`."""
    _gelu_gated(bfloat16_at(x_at), bfloat16_at(out_at), rows, width)
