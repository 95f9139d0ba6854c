"""Scores and weighted sums of up to four queries over one page, as `attention` puts them together.

Theory of operation: there.  A tile's sums stay in registers: four queries by as many vectors.
"""

from __future__ import annotations

from typing import Any, Final

from numba import njit, types
from numba.extending import intrinsic

from pinaivu_node.engine.kernels import vectors
from pinaivu_node.engine.kernels.memory import KERNEL, bfloat16_at, float32_at, variant
from pinaivu_node.engine.kernels.vectors import BFLOAT16, FLOAT32, I64, LANES, Format, at

PAGE: Final = 64
"""Positions per page: sixteen vectors of AVX, and fine enough to share short prefixes."""
TILE: Final = 4
"""Queries worked on together."""
POINTER: Final = {FLOAT32: float32_at, BFLOAT16: bfloat16_at}
_VECTORS: Final = 2 if vectors.HAS_FEW_REGISTERS else 4
"""Of a tile: four queries by so many vectors stay in registers."""
_LINE: Final = 64
"""Bytes that memory gives at once."""


def _ask(builder: Any, kind: Format, pointer: Any, count: int) -> None:
    """Ask for the memory of so many vectors ahead."""
    for begin in range(0, count * LANES * kind.bytes, _LINE):
        vectors.prefetch(builder, at(builder, pointer, I64(begin // kind.bytes)))


def _score_tile(queries: int, width_in_vectors: int, keys_format: Format) -> Any:
    """scores[n·stride + i] = query[n] · key[i], for so many queries and vectors of positions.

    Asks for the memory that is read next: as many `values`, in order, and these of the keys after
    them, `later`.
    """

    @intrinsic
    def tile(context, query, width, keys, values, later, scores, stride):
        floats = types.CPointer(types.float32)
        elements = types.CPointer(keys_format.element)
        signature = types.void(
            floats, types.int64, elements, elements, elements, floats, types.int64
        )

        def generate(context, b, signature, arguments):
            query, width, keys, values, later, scores, stride = arguments
            rows = [at(b, query, b.mul(width, I64(n))) for n in range(queries)]

            def one_dimension(i, sums):
                here = at(b, keys, b.mul(i, I64(PAGE)))
                next_values = at(b, values, b.mul(i, I64(LANES * width_in_vectors)))
                _ask(b, keys_format, next_values, width_in_vectors)
                _ask(b, keys_format, at(b, later, b.mul(i, I64(PAGE))), width_in_vectors)
                vector = [
                    keys_format.load(b, at(b, here, I64(LANES * v)), align=keys_format.bytes)
                    for v in range(width_in_vectors)
                ]
                totals = []
                for n, row in enumerate(rows):
                    x = vectors.everywhere(b, b.load(at(b, row, i)))
                    for v, key in enumerate(vector):
                        total = sums[n * width_in_vectors + v]
                        totals.append(vectors.multiply_add(b, x, key, total))
                return totals

            zeros = [vectors.ZERO] * (queries * width_in_vectors)
            sums = vectors.loop(b, I64(0), width, 1, zeros, one_dimension)
            for n in range(queries):
                for v in range(width_in_vectors):
                    to = b.add(b.mul(stride, I64(n)), I64(LANES * v))
                    FLOAT32.store(b, sums[n * width_in_vectors + v], at(b, scores, to))
            return context.get_dummy_value()

        return signature, generate

    return tile


def _value_tile(queries: int, width_in_vectors: int, values_format: Format) -> Any:
    """output[n·width + j] += Σ weight[n·stride + i] · value[i·width + j], i below `count`."""

    @intrinsic
    def tile(context, weights, stride, count, values, output, width):
        floats = types.CPointer(types.float32)
        elements = types.CPointer(values_format.element)
        signature = types.void(floats, types.int64, types.int64, elements, floats, types.int64)

        def generate(context, b, signature, arguments):
            weights, stride, count, values, output, width = arguments
            rows = [at(b, weights, b.mul(stride, I64(n))) for n in range(queries)]
            places = [
                at(b, output, b.add(b.mul(width, I64(n)), I64(LANES * v)))
                for n in range(queries)
                for v in range(width_in_vectors)
            ]

            def one_position(i, sums):
                here = at(b, values, b.mul(i, width))
                vector = [
                    values_format.load(b, at(b, here, I64(LANES * v)), align=values_format.bytes)
                    for v in range(width_in_vectors)
                ]
                totals = []
                for n, row in enumerate(rows):
                    weight = vectors.everywhere(b, b.load(at(b, row, i)))
                    for v, value in enumerate(vector):
                        total = sums[n * width_in_vectors + v]
                        totals.append(vectors.multiply_add(b, weight, value, total))
                return totals

            before = [FLOAT32.load(b, place, align=4) for place in places]
            sums = vectors.loop(b, I64(0), count, 1, before, one_position)
            for total, place in zip(sums, places, strict=True):
                FLOAT32.store(b, total, place)
            return context.get_dummy_value()

        return signature, generate

    return tile


def _for_each_size(make: Any) -> Any:
    """make(queries)(…), as one function of queries and the rest."""
    one, two, three, four = (make(queries) for queries in range(1, TILE + 1))

    @njit(**KERNEL)
    @variant
    def for_each_size(queries, *arguments):
        if queries == TILE:
            four(*arguments)
        elif queries == 3:
            three(*arguments)
        elif queries == 2:
            two(*arguments)
        else:
            one(*arguments)

    return for_each_size


def scores(kind: Format) -> Any:
    """`scores_of_page` of up to four queries, how many being its first argument."""
    pointer, size = POINTER[kind], kind.bytes
    all_positions, half = _VECTORS * LANES, _VECTORS // 2 * LANES

    def make(queries: int) -> Any:
        large = _score_tile(queries, _VECTORS, kind)
        small = _score_tile(queries, _VECTORS // 2, kind)

        @njit(**KERNEL)
        @variant
        def scores_of_page(query, width, keys_at, values_at, later_at, scores_at, stride, count):
            """Scores of the first `count` keys of a page, and of some after them."""
            i = 0
            while i < count:
                keys, later = pointer(keys_at + size * i), pointer(later_at + size * i)
                values = pointer(values_at + size * i * width)
                scores = float32_at(scores_at + 4 * i)
                if count - i > half:
                    large(query, width, keys, values, later, scores, stride)
                    i += all_positions
                else:
                    small(query, width, keys, values, later, scores, stride)
                    i += half

        return scores_of_page

    return _for_each_size(make)


def values(kind: Format) -> Any:
    """`values_of_page` of up to four queries, how many being its first argument."""
    pointer, size = POINTER[kind], kind.bytes
    many = _VECTORS * LANES

    def make(queries: int) -> Any:
        large = _value_tile(queries, _VECTORS, kind)
        small = _value_tile(queries, 1, kind)

        @njit(**KERNEL)
        @variant
        def values_of_page(weights, stride, count, values_at, output_at, width):
            """Output += the first `count` values of a page by their weights."""
            j = 0
            while j < width:
                values, output = pointer(values_at + size * j), float32_at(output_at + 4 * j)
                if width - j >= many:
                    large(weights, stride, count, values, output, width)
                    j += many
                else:
                    small(weights, stride, count, values, output, width)
                    j += LANES

        return values_of_page

    return _for_each_size(make)
