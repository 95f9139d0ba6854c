"""Rotary position embedding of queries and keys, in place, after an optional norm of each head."""

from __future__ import annotations

import numpy as np
from numba import njit

from pinaivu_node.engine.kernels.layers import row_scale
from pinaivu_node.engine.kernels.memory import KERNEL, bfloat16_at, float32_at, load, store


@njit(**KERNEL)
def _rotate(x, stride, tokens, heads, width, cosine, sine, turned):
    half = turned // 2
    for token in range(tokens):
        angle = token * turned
        for head in range(heads):
            at = token * stride + head * width
            for i in range(half):
                a, b = load(x, at + i), load(x, at + half + i)
                first = a * load(cosine, angle + i) - b * load(sine, angle + i)
                second = b * load(cosine, angle + half + i) + a * load(sine, angle + half + i)
                store(x, at + i, first)
                store(x, at + half + i, second)


@njit(**KERNEL)
def rotate_float32(x_at, stride, tokens, heads, width, cosine_at, sine_at, turned):
    """Rotate `heads` heads of each token; cosine and sine are [tokens, turned].

    Element i of the first half is paired with element i of the second (Su et al., 2021, in the
    layout of GPT-NeoX); of a head only the first `turned` elements turn.
    """
    cosine, sine = float32_at(cosine_at), float32_at(sine_at)
    _rotate(float32_at(x_at), stride, tokens, heads, width, cosine, sine, turned)


@njit(**KERNEL)
def rotate_bfloat16(x_at, stride, tokens, heads, width, cosine_at, sine_at, turned):
    """As `rotate_float32`."""
    cosine, sine = bfloat16_at(cosine_at), bfloat16_at(sine_at)
    _rotate(bfloat16_at(x_at), stride, tokens, heads, width, cosine, sine, turned)


@njit(**KERNEL)
def _head_norm(x, stride, tokens, heads, width, weight, epsilon, offset):
    for token in range(tokens):
        for head in range(heads):
            at = token * stride + head * width
            scale = row_scale(x, at, width, np.float32(epsilon))
            for i in range(width):
                store(x, at + i, load(x, at + i) * scale * (np.float32(offset) + weight[i]))


@njit(**KERNEL)
def head_norm_float32(x_at, stride, tokens, heads, width, weight_at, epsilon, offset):
    """RMS norm of each head, in place; the weight is float32."""
    weight = float32_at(weight_at)
    _head_norm(float32_at(x_at), stride, tokens, heads, width, weight, epsilon, offset)


@njit(**KERNEL)
def head_norm_bfloat16(x_at, stride, tokens, heads, width, weight_at, epsilon, offset):
    """As `head_norm_float32`."""
    weight = float32_at(weight_at)
    _head_norm(bfloat16_at(x_at), stride, tokens, heads, width, weight, epsilon, offset)
