"""Vectors of the machine at hand in LLVM's language: what numba itself does not have.

A kernel's innermost part is written here and there as an `intrinsic`, a function that emits LLVM's
instructions itself: what LLVM makes of a loop over numbers spills the sums that must stay in
registers.  Arithmetic is in float32 whatever the format, by fused multiply-add.
"""

from __future__ import annotations

from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

_HOST: Final = llvm.get_host_cpu_features()
_HAS_AVX512: Final = bool(_HOST.get("avx512f"))

LANES: Final = 16 if _HAS_AVX512 else 8 if _HOST.get("avx2") else 4
"""Numbers in a vector register of float32."""
HAS_FEW_REGISTERS: Final = bool(_HOST.get("avx2")) and not _HAS_AVX512
"""Sixteen of them instead of thirty-two."""

I32: Final = ir.IntType(32)
I64: Final = ir.IntType(64)
BYTES: Final = ir.IntType(8).as_pointer()
VECTOR: Final = ir.VectorType(ir.FloatType(), LANES)
ZERO: Final = ir.Constant(VECTOR, [0.0] * LANES)
_WORDS: Final = ir.VectorType(I32, LANES)
_HALVES: Final = ir.VectorType(ir.IntType(16), LANES)


class Format:
    """How the numbers of a tensor become vectors of float32, and such vectors numbers."""

    def __init__(self, *, short: bool) -> None:
        self._short = short
        self.element = types.uint16 if short else types.float32
        self.bytes = 2 if short else 4
        self.vector = _HALVES if short else VECTOR

    def load(self, builder: Any, pointer: Any, *, align: int) -> Any:
        """The vector there; bfloat16 is the upper half of a float32."""
        raw = builder.load(builder.bitcast(pointer, self.vector.as_pointer()))
        raw.align = align
        if not self._short:
            return raw
        words = builder.shl(builder.zext(raw, _WORDS), _words(16))
        return builder.bitcast(words, VECTOR)

    def store(self, builder: Any, vector: Any, pointer: Any) -> None:
        """Put the vector there, each number rounded to nearest even."""
        if self._short:
            words = builder.bitcast(vector, _WORDS)
            odd = builder.and_(builder.lshr(words, _words(16)), _words(1))
            rounded = builder.add(words, builder.add(odd, _words(0x7FFF)))
            vector = builder.trunc(builder.lshr(rounded, _words(16)), _HALVES)
        builder.store(vector, builder.bitcast(pointer, self.vector.as_pointer())).align = self.bytes


FLOAT32: Final = Format(short=False)
BFLOAT16: Final = Format(short=True)


def at(builder, pointer, index):
    """The address `index` elements after a pointer."""
    return builder.gep(pointer, [index])


def everywhere(builder, number):
    """A vector with this number in every lane."""
    undefined = ir.Constant(VECTOR, ir.Undefined)
    one = builder.insert_element(undefined, number, I32(0))
    return builder.shuffle_vector(one, undefined, _words(0))


def multiply_add(builder, a, b, total):
    """A · b + total, rounded once."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{LANES}f32"
    )
    return builder.call(function, [a, b, total])


def prefetch(builder: Any, pointer: Any) -> None:
    """Ask for the line of memory there: to read, soon, as data."""
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32]),
        "llvm.prefetch.p0",
    )
    builder.call(function, [builder.bitcast(pointer, BYTES), I32(0), I32(3), I32(1)])


def loop(builder: Any, start: Any, end: Any, step: int, totals: list[Any], body: Any) -> list[Any]:
    """For i in start, start + step, … below end: totals = body(i, totals); the last totals.

    The totals live in registers, as φ-nodes.
    """
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(I64)
    i.add_incoming(start, before)
    phis = [builder.phi(VECTOR) for _ in totals]
    for phi, total in zip(phis, totals, strict=True):
        phi.add_incoming(total, before)
    builder.cbranch(builder.icmp_signed("<", i, end), inside, after)
    builder.position_at_end(inside)
    new = body(i, phis)
    i.add_incoming(builder.add(i, I64(step)), builder.block)
    for phi, total in zip(phis, new, strict=True):
        phi.add_incoming(total, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return phis


def _words(number: int) -> Any:
    return ir.Constant(_WORDS, [number] * LANES)
