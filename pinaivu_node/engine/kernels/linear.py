"""Rows times a weight matrix: the product that a step spends its time in.

Theory of operation.  A decode step reads every weight once and does little with it, so it takes as
long as memory takes.  Weights lie in panels of `LANES` outputs, [panel, input, lane], read front to
back by one tile after the other, and each tile asks for what it will need `_AHEAD` inputs later:
without that, processors stop at the end of every page of memory for a third of the time.

A tile is some rows by some panels whose sums stay in registers from the first input to the last.
So tiles are written in LLVM's own language (see `vectors.py`).

Each output is one chain of fused multiply-adds over the inputs in order, beginning with the bias.
No width, tile or number of rows changes that: a row has the same bits alone as in any company, and
the same on every machine that has fused multiply-add.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from pinaivu_node.engine.kernels import vectors
from pinaivu_node.engine.kernels.memory import (
    KERNEL,
    bfloat16_at,
    float32_at,
    int8_at,
    load,
    variant,
)
from pinaivu_node.engine.kernels.vectors import BFLOAT16, FLOAT32, I64, LANES, Format, at

_PANELS: Final = 3
_ROWS: Final = 4 if vectors.HAS_FEW_REGISTERS else 8
"""Of the largest tile.  Its sums, 24, leave room in 32 registers; 12 do in 16."""
_UNROLL: Final = 4


class _Int8(Format):
    """Weights alone come in it."""

    def __init__(self) -> None:
        super().__init__(short=False)
        self.element = types.int8
        self.bytes = 1

    def load(self, builder: Any, pointer: Any, *, align: int) -> Any:
        eighths = ir.VectorType(ir.IntType(8), LANES)
        raw = builder.load(builder.bitcast(pointer, eighths.as_pointer()))
        raw.align = align
        return builder.sitofp(raw, self.vector)


_INT8: Final = _Int8()
_POINTER: Final = {FLOAT32: float32_at, BFLOAT16: bfloat16_at, _INT8: int8_at}
_OUTPUTS: Final = {FLOAT32: FLOAT32, BFLOAT16: BFLOAT16, _INT8: FLOAT32}
"""The format of the outputs, by that of the weights."""
_AHEAD: Final = 512 // LANES
"""Inputs of a panel, two kilobytes: as long as memory takes to answer."""


class _TileCode:
    """One tile in LLVM's language."""

    def __init__(
        self, builder: Any, rows: int, panels: int, weights: Format, arguments: Any
    ) -> None:
        self.builder, self.rows, self.panels, self.format = builder, rows, panels, weights
        x, width, weight, bias, out, stride = arguments
        self.width, self.out, self.stride, self.bias = width, out, stride, bias
        self.x = [at(builder, x, builder.mul(width, I64(row))) for row in range(rows)]
        panel = builder.mul(width, I64(LANES))
        self.weight = [at(builder, weight, builder.mul(panel, I64(p))) for p in range(panels)]

    def emit(self):
        b = self.builder
        biases = [
            FLOAT32.load(b, at(b, self.bias, I64(p * LANES)), align=4) for p in range(self.panels)
        ]
        whole = b.and_(self.width, I64(-_UNROLL))
        sums = vectors.loop(b, I64(0), whole, _UNROLL, biases * self.rows, self.some_inputs)
        sums = vectors.loop(b, whole, self.width, 1, sums, self.one_input)
        for row in range(self.rows):
            for p in range(self.panels):
                to = b.add(b.mul(self.stride, I64(row)), I64(p * LANES))
                _OUTPUTS[self.format].store(b, sums[row * self.panels + p], at(b, self.out, to))

    def some_inputs(self, i, sums):
        for n in range(_UNROLL):
            sums = self.one_input(self.builder.add(i, I64(n)), sums)
        return sums

    def one_input(self, i, sums):
        b = self.builder
        place = b.mul(i, I64(LANES))
        weights = []
        for panel in self.weight:
            here = at(b, panel, place)
            vectors.prefetch(b, at(b, here, I64(_AHEAD * LANES)))
            weights.append(self.format.load(b, here, align=self.format.bytes * LANES))
        totals = []
        for row in range(self.rows):
            x = vectors.everywhere(b, b.load(at(b, self.x[row], i)))
            for p in range(self.panels):
                total = sums[row * self.panels + p]
                totals.append(vectors.multiply_add(b, x, weights[p], total))
        return totals


def _tile(rows: int, panels: int, weights: Format) -> Any:
    """tile(x, width, weight, bias, out, stride): so many rows of x by so many panels."""

    @intrinsic
    def tile(context, x, width, weight, bias, out, stride):
        floats, elements = types.CPointer(types.float32), types.CPointer(weights.element)
        outputs = types.CPointer(_OUTPUTS[weights].element)
        signature = types.void(floats, types.int64, elements, floats, outputs, types.int64)

        def generate(context, builder, signature, arguments):
            _TileCode(builder, rows, panels, weights, arguments).emit()
            return context.get_dummy_value()

        return signature, generate

    return tile


def _strip(panels: int, weights: Format) -> Any:
    """strip(x, rows, width, weight, bias, out, stride): all rows by so many panels."""
    pointer, out_pointer, size = (
        _POINTER[weights],
        _POINTER[_OUTPUTS[weights]],
        _OUTPUTS[weights].bytes,
    )
    one, two, three, four = (_tile(n, panels, weights) for n in (1, 2, 3, 4))
    five, six, seven = (_tile(min(n, _ROWS), panels, weights) for n in (5, 6, 7))
    full = _tile(_ROWS, panels, weights)

    @njit(**KERNEL)
    @variant
    def strip(x_at, rows, width, weight_at, bias_at, out_at, stride):
        weight, bias = pointer(weight_at), float32_at(bias_at)
        for row in range(0, rows, _ROWS):
            x, out = float32_at(x_at + 4 * row * width), out_pointer(out_at + size * row * stride)
            left = rows - row
            if left >= _ROWS:
                full(x, width, weight, bias, out, stride)
            elif left == 1:
                one(x, width, weight, bias, out, stride)
            elif left == 2:
                two(x, width, weight, bias, out, stride)
            elif left == 3:
                three(x, width, weight, bias, out, stride)
            elif left == 4:
                four(x, width, weight, bias, out, stride)
            elif left == 5:
                five(x, width, weight, bias, out, stride)
            elif left == 6:
                six(x, width, weight, bias, out, stride)
            else:
                seven(x, width, weight, bias, out, stride)

    return strip


def _product(weights: Format) -> Any:
    size, out_size = weights.bytes, _OUTPUTS[weights].bytes
    wide, single = _strip(_PANELS, weights), _strip(1, weights)

    @njit(**KERNEL)
    @variant
    def product(x_at, rows, width, weight_at, bias_at, out_at, begin, end, stride):
        panel = begin
        while panel < end:
            weight = weight_at + size * panel * width * LANES
            bias, out = bias_at + 4 * panel * LANES, out_at + out_size * panel * LANES
            if end - panel >= _PANELS:
                wide(x_at, rows, width, weight, bias, out, stride)
                panel += _PANELS
            else:
                single(x_at, rows, width, weight, bias, out, stride)
                panel += 1

    return product


_product_float32: Final = _product(FLOAT32)
_product_bfloat16: Final = _product(BFLOAT16)
_product_int8: Final = _product(_INT8)


@njit(**KERNEL)
def linear_float32(x_at, rows, width, weight_at, bias_at, out_at, panels):
    """Out = x · weightᵀ + bias.

    x, out    float32 [rows, width], [rows, panels · LANES], dense
    weight    float32 [panels, width, LANES], aligned to a vector
    bias      float32 [panels · LANES]
    """
    stride = panels * LANES
    _product_float32(x_at, rows, width, weight_at, bias_at, out_at, 0, panels, stride)


@njit(parallel=True, **KERNEL)
def linear_float32_by_all(x_at, rows, width, weight_at, bias_at, out_at, panels, parts):
    """As `linear_float32`, by as many threads as there are parts."""
    stride = panels * LANES
    groups = -(-panels // _PANELS)
    for part in prange(parts):
        begin = groups * part // parts * _PANELS
        end = min(groups * (part + 1) // parts * _PANELS, panels)
        _product_float32(x_at, rows, width, weight_at, bias_at, out_at, begin, end, stride)


@njit(**KERNEL)
def linear_bfloat16(x_at, rows, width, weight_at, bias_at, out_at, panels, scratch_at):
    """As `linear_float32`; x, weight and out in bfloat16, `scratch` float32 [rows, width]."""
    x, scratch = bfloat16_at(x_at), float32_at(scratch_at)
    for i in range(rows * width):
        scratch[i] = load(x, i)
    stride = panels * LANES
    _product_bfloat16(scratch_at, rows, width, weight_at, bias_at, out_at, 0, panels, stride)


@njit(**KERNEL)
def linear_int8(x_at, rows, width, weight_at, bias_at, out_at, panels):
    """As `linear_float32`, with weights in int8; what they count is for the caller to multiply."""
    stride = panels * LANES
    _product_int8(x_at, rows, width, weight_at, bias_at, out_at, 0, panels, stride)
