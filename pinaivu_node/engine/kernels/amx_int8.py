"""Rows times a weight matrix in int8, by the matrix unit of recent x86 processors (AMX).

As `amx.py`, but an instruction takes 64 inputs, four to a word (TDPBSSD), and a sum is an integer.
A row of inputs is two rows of int8 (see `integer.py`), so that a tile holds eight of them.

Weights lie in panels of 16 outputs, [panel, four inputs, output, 4].
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from pinaivu_node.engine.kernels.amx import GRAIN_BYTES, LANES, SCRATCH_FLOATS, group_of_panels
from pinaivu_node.engine.kernels.integer import HIGH, split_rows_bfloat16, split_rows_float32
from pinaivu_node.engine.kernels.memory import KERNEL, float32_at, variant
from pinaivu_node.engine.kernels.vectors import BFLOAT16, FLOAT32, I32, Format, everywhere

GRAIN: Final = GRAIN_BYTES
"""Inputs of one instruction."""
_LINE: Final = 64
_INTEGERS: Final = ir.VectorType(I32, LANES)


def _put_vector(kind: Format) -> Any:
    @intrinsic
    def put_vector(context, sums, row_scale, scale, bias, out):
        """Sixteen sums of high and, a line below, of low, as numbers, to the output.

        All but the row's scale are addresses.
        """

        def generate(context, b, signature, arguments):
            sums, row_scale, scale, bias, out = arguments

            def numbers(address):
                integers = b.load(b.inttoptr(address, _INTEGERS.as_pointer()))
                integers.align = 4
                return b.sitofp(integers, FLOAT32.vector)

            def vector(address):
                return FLOAT32.load(b, b.inttoptr(address, FLOAT32.vector.as_pointer()), align=4)

            high, low = numbers(sums), numbers(b.add(sums, sums.type(_LINE)))
            total = b.fadd(b.fmul(high, ir.Constant(FLOAT32.vector, [float(HIGH)] * LANES)), low)
            total = b.fmul(b.fmul(total, everywhere(b, row_scale)), vector(scale))
            total = b.fadd(total, vector(bias))
            kind.store(b, total, b.inttoptr(out, kind.vector.as_pointer()))
            return context.get_dummy_value()

        address = types.int64
        return types.void(address, types.float32, address, address, address), generate

    return put_vector


def _linear(kind: Format, split_rows: Any) -> tuple[Any, Any]:
    size = kind.bytes
    put_vector = _put_vector(kind)

    @njit(**KERNEL)
    @variant
    def put(sums, row, rows, panel, terms):
        row_scales_at, scale, bias, out, stride = terms
        row_scales = float32_at(row_scales_at)
        out += size * LANES * panel + stride * (row // 2)
        for each in range(rows // 2):
            put_vector(
                sums + 2 * _LINE * each,
                row_scales[row // 2 + each],
                scale + _LINE * panel,
                bias + _LINE * panel,
                out + stride * each,
            )

    group_of = group_of_panels("tdpbssd", put)

    @njit(**KERNEL)
    @variant
    def one_group(x, weight_at, out_at, group, groups, scratch):
        split, row_scales, rows, padded = x
        weight, scale, bias = weight_at
        stride = size * 4 * LANES * groups
        terms = (
            row_scales,
            scale + 4 * _LINE * group,
            bias + 4 * _LINE * group,
            out_at + size * 4 * LANES * group,
            stride,
        )
        group_of(split, 2 * rows, padded, weight + 4 * LANES * padded * group, terms, scratch)

    @njit(**KERNEL)
    @variant
    def linear(x_at, rows, width, split_at, padded, weight_at, out_at, groups, scratch_at):
        """Out = x · weightᵀ · scale + bias.

        x, out     [rows, width], [rows, 64 · groups], dense
        split      memory for int8 [rows, 2, padded] and float32 [rows]; padded a multiple of GRAIN
        weight_at  addresses of the weights, int8 [4 · groups, padded / 4, LANES, 4], of the
                   scales and of the biases, both float32 [64 · groups]
        scratch    SCRATCH_FLOATS
        """
        row_scales = split_at + 2 * rows * padded
        split_rows(x_at, rows, width, padded, split_at, row_scales)
        x = split_at, row_scales, rows, padded
        for group in range(groups):
            one_group(x, weight_at, out_at, group, groups, scratch_at)

    @njit(parallel=True, **KERNEL)
    @variant
    def linear_by_all(
        x_at, rows, width, split_at, padded, weight_at, out_at, groups, scratch_at, parts
    ):
        """As `linear`, by as many threads as there are parts, each with its own scratch memory."""
        row_scales = split_at + 2 * rows * padded
        split_rows(x_at, rows, width, padded, split_at, row_scales)
        for part in prange(parts):
            scratch = scratch_at + 4 * SCRATCH_FLOATS * part
            x = split_at, row_scales, rows, padded
            for group in range(groups * part // parts, groups * (part + 1) // parts):
                one_group(x, weight_at, out_at, group, groups, scratch)

    return linear, linear_by_all


linear_float32, linear_float32_by_all = _linear(FLOAT32, split_rows_float32)
linear_bfloat16, linear_bfloat16_by_all = _linear(BFLOAT16, split_rows_bfloat16)
