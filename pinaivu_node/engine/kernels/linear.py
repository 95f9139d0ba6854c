"""Rows times a weight matrix: the product that a step spends its time in.

Theory of operation.  A decode step reads every weight once and does little with it, so it takes as
long as memory takes.  Weights lie in panels of `LANES` outputs, [panel, input, lane], read front to
back by one tile after the other, and each tile asks for what it will need `_AHEAD` inputs later:
without that, processors stop at the end of every page of memory for a third of the time.

A tile is some rows by some panels whose sums stay in registers from the first input to the last.
Numba has no vectors, and what LLVM makes of loops spills those sums; so tiles are written in LLVM's
own language, with the widths of the machine at hand.

Each output is one chain of fused multiply-adds over the inputs in order, beginning with the bias.
No width, tile or number of rows changes that: a row has the same bits alone as in any company, and
the same on every machine that has fused multiply-add.
"""

from __future__ import annotations

from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from pinaivu_node.engine.kernels.memory import (
    KERNEL,
    bfloat16_at,
    float32_at,
    load,
)

_HOST: Final = llvm.get_host_cpu_features()
_WIDE: Final = bool(_HOST.get("avx512f"))
_NARROW: Final = not _WIDE and bool(_HOST.get("avx2"))

LANES: Final = 16 if _WIDE else 8 if _NARROW else 4
"""Outputs in a panel: a vector register of float32."""
_PANELS: Final = 3
_ROWS: Final = 4 if _NARROW else 8
"""Of the largest tile.  Its sums, 24, leave room in 32 registers; AVX2 has 16."""
_UNROLL: Final = 4
_AHEAD: Final = 512 // LANES
"""Inputs of a panel, two kilobytes: as long as memory takes to answer."""

_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_FLOAT: Final = ir.FloatType()
_VECTOR: Final = ir.VectorType(_FLOAT, LANES)
_WORDS: Final = ir.VectorType(_I32, LANES)
_HALVES: Final = ir.VectorType(ir.IntType(16), LANES)


def _at(builder, pointer, index):
    return builder.gep(pointer, [index])


def _words(number):
    return ir.Constant(_WORDS, [number] * LANES)


class _Format:
    """How a format's vectors are loaded, as float32, and stored."""

    def __init__(self, *, short: bool) -> None:
        self.short = short
        self.element = types.uint16 if short else types.float32
        self.vector = _HALVES if short else _VECTOR
        self.bytes = (2 if short else 4) * LANES

    def load(self, builder, pointer, *, align=None):
        raw = builder.load(builder.bitcast(pointer, self.vector.as_pointer()))
        raw.align = align or self.bytes
        if not self.short:
            return raw
        words = builder.shl(builder.zext(raw, _WORDS), _words(16))
        return builder.bitcast(words, _VECTOR)

    def store(self, builder, vector, pointer):
        if self.short:
            words = builder.bitcast(vector, _WORDS)
            odd = builder.and_(builder.lshr(words, _words(16)), _words(1))
            rounded = builder.add(words, builder.add(odd, _words(0x7FFF)))
            vector = builder.trunc(builder.lshr(rounded, _words(16)), _HALVES)
        builder.store(vector, builder.bitcast(pointer, self.vector.as_pointer())).align = 2


FLOAT32: Final = _Format(short=False)
BFLOAT16: Final = _Format(short=True)


class _TileCode:
    """One tile in LLVM's language; the sums live in φ-nodes."""

    def __init__(
        self, builder: Any, rows: int, panels: int, weights: _Format, arguments: Any
    ) -> None:
        self.builder, self.rows, self.panels, self.format = builder, rows, panels, weights
        x, width, weight, bias, out, stride = arguments
        self.width, self.out, self.stride, self.bias = width, out, stride, bias
        self.x = [_at(builder, x, builder.mul(width, _I64(row))) for row in range(rows)]
        panel = builder.mul(width, _I64(LANES))
        self.weight = [_at(builder, weight, builder.mul(panel, _I64(p))) for p in range(panels)]
        self.fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
        )
        byte = ir.IntType(8).as_pointer()
        self.prefetch = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32]),
            "llvm.prefetch.p0",
        )

    def emit(self):
        b = self.builder
        biases = [
            b.load(b.bitcast(_at(b, self.bias, _I64(p * LANES)), _VECTOR.as_pointer()))
            for p in range(self.panels)
        ]
        for each in biases:
            each.align = 4
        sums = biases * self.rows
        whole = b.and_(self.width, _I64(-_UNROLL))
        sums = self.loop(_I64(0), whole, _UNROLL, sums)
        sums = self.loop(whole, self.width, 1, sums)
        for row in range(self.rows):
            for p in range(self.panels):
                to = b.add(b.mul(self.stride, _I64(row)), _I64(p * LANES))
                self.format.store(b, sums[row * self.panels + p], _at(b, self.out, to))

    def loop(self, start, end, step, sums):
        """Add the products of inputs start…end−1, `step` at a time."""
        b = self.builder
        before = b.block
        head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(_I64)
        i.add_incoming(start, before)
        phis = [b.phi(_VECTOR) for _ in sums]
        for phi, total in zip(phis, sums, strict=True):
            phi.add_incoming(total, before)
        b.cbranch(b.icmp_signed("<", i, end), body, after)
        b.position_at_end(body)
        totals = list(phis)
        for n in range(step):
            totals = self.one_input(b.add(i, _I64(n)), totals)
        i.add_incoming(b.add(i, _I64(step)), b.block)
        for phi, total in zip(phis, totals, strict=True):
            phi.add_incoming(total, b.block)
        b.branch(head)
        b.position_at_end(after)
        return phis

    def one_input(self, i, sums):
        b = self.builder
        at = b.mul(i, _I64(LANES))
        weights = []
        for panel in self.weight:
            here = _at(b, panel, at)
            ahead = b.bitcast(_at(b, here, _I64(_AHEAD * LANES)), ir.IntType(8).as_pointer())
            b.call(self.prefetch, [ahead, _I32(0), _I32(3), _I32(1)])  # to read, soon, as data
            weights.append(self.format.load(b, here))
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        totals = []
        for row in range(self.rows):
            one = b.insert_element(undefined, b.load(_at(b, self.x[row], i)), _I32(0))
            all_lanes = b.shuffle_vector(one, undefined, ir.Constant(_WORDS, [0] * LANES))
            for p in range(self.panels):
                total = sums[row * self.panels + p]
                totals.append(b.call(self.fma, [all_lanes, weights[p], total]))
        return totals


def _tile(rows: int, panels: int, weights: _Format) -> Any:
    """tile(x, width, weight, bias, out, stride): so many rows of x by so many panels."""

    @intrinsic
    def tile(context, x, width, weight, bias, out, stride):
        floats, elements = types.CPointer(types.float32), types.CPointer(weights.element)
        signature = types.void(floats, types.int64, elements, floats, elements, types.int64)

        def generate(context, builder, signature, arguments):
            _TileCode(builder, rows, panels, weights, arguments).emit()
            return context.get_dummy_value()

        return signature, generate

    return tile


def _strip(panels: int, weights: _Format) -> Any:
    """strip(x, rows, width, weight, bias, out, stride): all rows by so many panels."""
    pointer = bfloat16_at if weights.short else float32_at
    size = 2 if weights.short else 4
    one, two, three, four = (_tile(n, panels, weights) for n in (1, 2, 3, 4))
    five, six, seven = (_tile(min(n, _ROWS), panels, weights) for n in (5, 6, 7))
    full = _tile(_ROWS, panels, weights)

    @njit(**KERNEL)
    def strip(x_at, rows, width, weight_at, bias_at, out_at, stride):
        weight, bias = pointer(weight_at), float32_at(bias_at)
        for row in range(0, rows, _ROWS):
            x, out = float32_at(x_at + 4 * row * width), pointer(out_at + size * row * stride)
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


def _product(weights: _Format) -> Any:
    size = 2 if weights.short else 4
    wide, single = _strip(_PANELS, weights), _strip(1, weights)

    @njit(**KERNEL)
    def product(x_at, rows, width, weight_at, bias_at, out_at, begin, end, stride):
        panel = begin
        while panel < end:
            weight = weight_at + size * panel * width * LANES
            bias, out = bias_at + 4 * panel * LANES, out_at + size * panel * LANES
            if end - panel >= _PANELS:
                wide(x_at, rows, width, weight, bias, out, stride)
                panel += _PANELS
            else:
                single(x_at, rows, width, weight, bias, out, stride)
                panel += 1

    return product


_product_float32: Final = _product(FLOAT32)
_product_bfloat16: Final = _product(BFLOAT16)


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
