"""Rows of float32 or bfloat16 as rows of int8, for products with weights in int8.

A number of a row is scale · (256 · high + low), with one scale for the row and two int8 for the
number: eight bits of a row are too few for language models, whose rows have a few numbers that are
a hundred times the others.  With sixteen, what is lost is lost in the weights.

Products of int8 are summed in int32, exactly, in whatever order: a row has the same bits alone as
in any company, and the same on every processor.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from pinaivu_node.engine.kernels.memory import (
    KERNEL,
    bfloat16_at,
    float32_at,
    load,
    uint8_at,
    variant,
)

HIGH: Final = 256
"""What high counts."""
LARGEST: Final = 127 * HIGH + 127
"""That high and low can say."""
WIDTH_MOST: Final = 2**31 // (128 * 127)
"""Inputs whose products cannot overflow a sum."""
_MAGIC: Final = np.float32(1.5 * 2**23)
"""Added to a small number, it leaves the number rounded to nearest even in the lowest bits."""
_MAGIC_BITS: Final = np.int32(0x4B400000)
_INFINITE: Final = np.int32(0x7F800000)
_TINY: Final = np.float32(1e-30)
"""A row with nothing above it is zero: its scale could not be inverted."""


def _split_rows(pointer: Any, size: int) -> Any:
    @njit(**KERNEL)
    @variant
    def split_rows(x_at, rows, width, padded, out_at, scales_at):
        """High and low of every number, and the scale of every row.

        x         [rows, width], dense
        out       int8 [rows, 2, padded], zero beyond width
        scales    float32 [rows]; NaN for a row that holds one or an infinity
        """
        scales = float32_at(scales_at)
        for row in range(rows):
            x = pointer(x_at + size * row * width)
            high, low = (
                uint8_at(out_at + 2 * row * padded),
                uint8_at(out_at + (2 * row + 1) * padded),
            )
            largest = np.int32(0)
            for i in range(width):
                # Numbers without sign are in the order of their bits, and integers vectorise.
                bits = np.float32(load(x, i)).view(np.int32) & np.int32(0x7FFFFFFF)
                largest = max(largest, bits)
            most = np.int32(largest).view(np.float32)
            if largest >= _INFINITE:
                scales[row], inverse = np.float32(np.nan), np.float32(0)
            elif most < _TINY:
                scales[row], inverse = np.float32(0), np.float32(0)
            else:
                scales[row] = most / np.float32(LARGEST)
                inverse = np.float32(LARGEST) / most
            if largest >= _INFINITE:
                for i in range(width):
                    high[i] = low[i] = np.uint8(0)
            else:
                for i in range(width):
                    scaled = np.float32(np.float32(load(x, i)) * inverse + _MAGIC)
                    number = np.int32(scaled.view(np.int32) - _MAGIC_BITS)
                    upper = np.int32(np.int32(number + np.int32(128)) >> np.int32(8))
                    high[i] = np.uint8(upper)
                    low[i] = np.uint8(number)
            for i in range(width, padded):
                high[i] = low[i] = np.uint8(0)

    return split_rows


split_rows_float32: Final = _split_rows(float32_at, 4)
split_rows_bfloat16: Final = _split_rows(bfloat16_at, 2)
