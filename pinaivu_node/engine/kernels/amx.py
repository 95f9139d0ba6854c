"""Rows times a weight matrix in bfloat16, by the matrix unit of recent x86 processors (AMX).

The unit has eight tiles of 16 rows by 64 bytes.  One instruction adds to a tile of sums, 16 by 16
float32, the products of 16 rows by 32 inputs of the one matrix and 32 inputs by 16 outputs of the
other; this file calls those instructions by LLVM's names for them (Intel 64 and IA-32 Architectures
Software Developer's Manual, volume 2, TDPBF16PS and TILELOADD).

Weights lie in panels of 16 outputs, [panel, pair of inputs, output, 2], read front to back; as in
`linear.py`, what is needed next is asked for ahead, since a decode step is as fast as memory.

A sum is taken pair by pair of inputs in order, for each row by itself.  So here too a row has the
same bits alone as in any company.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any, Final

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from pinaivu_node.engine.kernels import vectors
from pinaivu_node.engine.kernels.memory import KERNEL, uint8_at, variant
from pinaivu_node.engine.kernels.vectors import BFLOAT16, BYTES, FLOAT32, I64

LANES: Final = 16
"""Outputs in a panel."""
GRAIN_BYTES: Final = 64
"""Of a row in one instruction; rows are padded with zeros to a multiple of it."""
GRAIN: Final = GRAIN_BYTES // 2
"""Inputs in bfloat16."""
SCRATCH_FLOATS: Final = 4 * 256 + 16
"""Float32 numbers of scratch memory that a thread needs: four tiles of sums, and the unit's
configuration."""
_TILE_BYTES: Final = 1024
_AHEAD: Final = 2 * _TILE_BYTES
_LINE: Final = 64
_SYS_ARCH_PRCTL: Final = 158
_ARCH_REQ_XCOMP_PERM: Final = 0x1023
_XFEATURE_XTILEDATA: Final = 18


@cache
def is_here() -> bool:
    """Whether this process may use the unit; asks Linux for it (Documentation/arch/x86/xstate)."""
    features = llvm.get_host_cpu_features()
    parts = ("amx-tile", "amx-bf16", "amx-int8")
    if platform.system() != "Linux" or not all(features.get(part) for part in parts):
        return False
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    return bool(syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


# --- instructions ---------------------------------------------------------------------------------

_I8: Final = ir.IntType(8)


def _instruction(name: str, tiles: tuple[int, ...] = (), operands: tuple[Any, ...] = ()) -> Any:
    """A function of integers that is one instruction; pointers among them come as addresses."""
    kinds = [_I8] * len(tiles) + list(operands)

    def generate(context, builder, signature, arguments):
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), kinds), name
        )
        values = [
            builder.inttoptr(value, BYTES) if kind is BYTES else value
            for value, kind in zip(arguments, operands, strict=True)
        ]
        builder.call(function, [_I8(tile) for tile in tiles] + values)
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * len(operands))
    match len(operands):
        case 0:
            return intrinsic(lambda context: (signature, generate))
        case 1:
            return intrinsic(lambda context, a: (signature, generate))
        case _:
            return intrinsic(lambda context, a, b: (signature, generate))


_configure: Final = _instruction("llvm.x86.ldtilecfg", operands=(BYTES,))
_release: Final = _instruction("llvm.x86.tilerelease")


def _zero(tile: int) -> Any:
    return _instruction("llvm.x86.tilezero", (tile,))


def _load(tile: int) -> Any:
    return _instruction("llvm.x86.tileloadd64", (tile,), (BYTES, I64))


def _save(tile: int) -> Any:
    return _instruction("llvm.x86.tilestored64", (tile,), (BYTES, I64))


def _multiply(name: str, sums: int, x: int, weight: int) -> Any:
    return _instruction(f"llvm.x86.{name}", (sums, x, weight))


@intrinsic
def _prefetch(context, address):
    """Ask for the line of memory there."""

    def generate(context, builder, signature, arguments):
        vectors.prefetch(builder, builder.inttoptr(arguments[0], BYTES))
        return context.get_dummy_value()

    return types.void(types.int64), generate


# Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 weights.
_zero0, _zero1, _zero2, _zero3 = (_zero(tile) for tile in range(4))
_save0, _save1, _save2, _save3 = (_save(tile) for tile in range(4))
_load4, _load5, _load6, _load7 = (_load(tile) for tile in range(4, 8))


# --- tiles ----------------------------------------------------------------------------------------


@njit(**KERNEL)
def _ask_ahead(address):
    for line in range(0, _TILE_BYTES, _LINE):
        _prefetch(address + _AHEAD + line)


@njit(**KERNEL)
def _begin(config):
    """Palette 1 of the unit, every tile 16 rows of 64 bytes."""
    for i in range(_LINE):
        config[i] = np.uint8(0)
    config[0] = np.uint8(1)
    for tile in range(8):
        config[16 + 2 * tile] = np.uint8(_LINE)
        config[48 + tile] = np.uint8(16)


@njit(**KERNEL)
def _configure_rows(config, config_at, first, second):
    """Tiles 0, 1 and 4 hold `first` rows; 2, 3 and 5 hold `second`."""
    config[48] = config[49] = config[52] = np.uint8(first)
    config[50] = config[51] = config[53] = np.uint8(second)
    _configure(config_at)


def _row_of_tiles(multiply: str) -> Any:
    add046, add147, add246, add347 = (
        _multiply(multiply, 0, 4, 6), _multiply(multiply, 1, 4, 7),
        _multiply(multiply, 2, 4, 6), _multiply(multiply, 3, 4, 7),
    )  # fmt: skip

    @njit(**KERNEL)
    @variant
    def up_to_16_rows(x, stride, weight, scratch):
        """Sums of one tile of rows by four panels."""
        panel = LANES * stride
        _zero0()
        _zero1()
        _zero2()
        _zero3()
        for k in range(stride // GRAIN_BYTES):
            at = weight + k * _TILE_BYTES
            _load4(x + GRAIN_BYTES * k, stride)
            _ask_ahead(at)
            _load6(at, _LINE)
            add046()
            _ask_ahead(at + panel)
            _load7(at + panel, _LINE)
            add147()
            _ask_ahead(at + 2 * panel)
            _load6(at + 2 * panel, _LINE)
            add246()
            _ask_ahead(at + 3 * panel)
            _load7(at + 3 * panel, _LINE)
            add347()
        _save0(scratch, _LINE)
        _save1(scratch + _TILE_BYTES, _LINE)
        _save2(scratch + 2 * _TILE_BYTES, _LINE)
        _save3(scratch + 3 * _TILE_BYTES, _LINE)

    return up_to_16_rows


def _pairs_of_tiles(multiply: str, *, asks_ahead: bool) -> Any:
    add046, add147, add256, add357 = (
        _multiply(multiply, 0, 4, 6), _multiply(multiply, 1, 4, 7),
        _multiply(multiply, 2, 5, 6), _multiply(multiply, 3, 5, 7),
    )  # fmt: skip

    @njit(**KERNEL)
    @variant
    def up_to_32_rows(x, stride, weight, scratch):
        """Sums of two tiles of rows by two panels."""
        panel = LANES * stride
        _zero0()
        _zero1()
        _zero2()
        _zero3()
        for k in range(stride // GRAIN_BYTES):
            at = weight + k * _TILE_BYTES
            _load4(x + GRAIN_BYTES * k, stride)
            _load6(at, _LINE)
            add046()
            _load5(x + GRAIN_BYTES * k + 16 * stride, stride)
            add256()
            if asks_ahead:
                _ask_ahead(at)
                _ask_ahead(at + panel)
            _load7(at + panel, _LINE)
            add147()
            add357()
        _save0(scratch, _LINE)
        _save1(scratch + _TILE_BYTES, _LINE)
        _save2(scratch + 2 * _TILE_BYTES, _LINE)
        _save3(scratch + 3 * _TILE_BYTES, _LINE)

    return up_to_32_rows


def group_of_panels(multiply: str, put: Any) -> Any:
    """group(x, rows, stride, weight, terms, scratch): all rows by the four panels at `weight`.

    A row and each of a panel's outputs have `stride` bytes, and `multiply` names the instruction
    that takes them together.  Tiles of sums are handed to
    put(sums, row, rows, panel, terms): of `rows` rows from `row` on, and one panel of the four.
    """
    up_to_16_rows = _row_of_tiles(multiply)
    up_to_32_rows = _pairs_of_tiles(multiply, asks_ahead=True)
    # The weights are in the processor's own memory since the rows before.
    up_to_32_rows_again = _pairs_of_tiles(multiply, asks_ahead=False)

    @njit(**KERNEL)
    @variant
    def group(x_at, rows, stride, weight, terms, scratch):
        config_at = scratch + 4 * _TILE_BYTES
        config = uint8_at(config_at)
        _begin(config)
        row = 0
        while row < rows:
            x = x_at + stride * row
            left = rows - row
            if left <= 16:
                _configure_rows(config, config_at, left, left)
                up_to_16_rows(x, stride, weight, scratch)
                for panel in range(4):
                    put(scratch + panel * _TILE_BYTES, row, left, panel, terms)
                break
            second = min(16, left - 16)
            _configure_rows(config, config_at, 16, second)
            for pair in range(2):
                panels = weight + pair * 2 * LANES * stride
                if row == 0:
                    up_to_32_rows(x, stride, panels, scratch)
                else:
                    up_to_32_rows_again(x, stride, panels, scratch)
                for n in range(2):
                    sums = scratch + n * _TILE_BYTES
                    put(sums, row, 16, 2 * pair + n, terms)
                    put(sums + 2 * _TILE_BYTES, row + 16, second, 2 * pair + n, terms)
            row += 32
        _release()

    return group


# --- bfloat16 -------------------------------------------------------------------------------------


@intrinsic
def _put_vector(context, sums, bias, out):
    """Sixteen sums and their biases to the output, rounded; all three are addresses."""

    def generate(context, builder, signature, arguments):
        floats, halves = FLOAT32.vector.as_pointer(), BFLOAT16.vector.as_pointer()
        total, addend = (
            FLOAT32.load(builder, builder.inttoptr(each, floats), align=4) for each in arguments[:2]
        )
        out = builder.inttoptr(arguments[2], halves)
        BFLOAT16.store(builder, builder.fadd(total, addend), out)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit(**KERNEL)
def _put(sums, row, rows, panel, terms):
    bias, out, stride = terms
    out += stride * row + 2 * LANES * panel
    for each in range(rows):
        _put_vector(sums + _LINE * each, bias + _LINE * panel, out + stride * each)


_group: Final = group_of_panels("tdpbf16ps", _put)


@njit(**KERNEL)
def linear(x_at, rows, width, weight_at, bias_at, out_at, groups, scratch_at):
    """Out = x · weightᵀ + bias.

    x, out     bfloat16 [rows, width], [rows, 64 · groups], dense; width a multiple of GRAIN
    weight     bfloat16 [4 · groups, width / 2, LANES, 2]
    bias       float32 [64 · groups]
    scratch    SCRATCH_FLOATS
    """
    for group in range(groups):
        weight = weight_at + 8 * LANES * width * group
        terms = bias_at + 4 * _LINE * group, out_at + 2 * _LINE * group, 2 * _LINE * groups
        _group(x_at, rows, 2 * width, weight, terms, scratch_at)


@njit(parallel=True, **KERNEL)
def linear_by_all(x_at, rows, width, weight_at, bias_at, out_at, groups, scratch_at, parts):
    """As `linear`, by as many threads as there are parts, each with its own scratch memory."""
    for part in prange(parts):
        scratch = scratch_at + 4 * SCRATCH_FLOATS * part
        for group in range(groups * part // parts, groups * (part + 1) // parts):
            weight = weight_at + 8 * LANES * width * group
            terms = bias_at + 4 * _LINE * group, out_at + 2 * _LINE * group, 2 * _LINE * groups
            _group(x_at, rows, 2 * width, weight, terms, scratch)
