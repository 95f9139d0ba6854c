"""Attention over a paged KV cache, for decode and prefill alike, on one CPU core.

Theory of operation.  A batch is a packed list of tokens: for each sequence the next token, or a
chunk of its prompt.  `attend` first writes the keys and values of all tokens into their pages, then
lets every query look at the positions up to its own.  A page holds `PAGE` positions of one KV head,
keys as [head_dim, PAGE] and values as [PAGE, head_dim]: then both products run along contiguous
memory, the scores of 64 positions at a time and a value's row at a time.  Since the kernel walks
the block table itself, pages cost nothing over contiguous rows (gathering them for a matrix product
would double the work).

Up to four queries are worked on together, so that what is read from the cache is used four times:
the heads of a group in decode, heads and tokens in prefill.

Every sum is taken in an order given by positions and dimensions alone: scores over dimensions in
order, weights over positions in sixteen lanes by position, values over positions in order.  Masked
positions add an exact zero.  So a token's output is the same to the bit whether it was computed in
decode or in a chunk of any length, and whoever else was in the batch.
"""

from __future__ import annotations

from typing import Any, Final

from numba import njit, types
from numba.extending import intrinsic

from pinaivu_node.engine.kernels import vectors
from pinaivu_node.engine.kernels.arithmetic import MINUS_INFINITY, ONE, ZERO, exponential, tanh
from pinaivu_node.engine.kernels.memory import (
    KERNEL,
    bfloat16_at,
    float32_at,
    int64_at,
    load,
    store,
    variant,
)
from pinaivu_node.engine.kernels.vectors import BFLOAT16, FLOAT32, I64, LANES, Format, at

PAGE: Final = 64
"""Positions per page: sixteen vectors of AVX, and fine enough to share short prefixes."""
TILE: Final = 4
"""Queries worked on together."""
GRAIN: Final = 16
"""Keys and values are padded with zeros to a multiple of it: the widest vector."""
_LANES: Final = 16
"""Of a softmax: partial sums, by position modulo this."""
_VECTORS: Final = 2 if vectors.HAS_FEW_REGISTERS else 4
"""Of a tile: four queries by so many vectors stay in registers."""
_LINE: Final = 64
"""Bytes that memory gives at once."""
_POINTER: Final = {FLOAT32: float32_at, BFLOAT16: bfloat16_at}


def scratch_floats(*, window: int, head_dim: int) -> int:
    """How many float32 numbers of scratch memory `attend` needs for positions below `window`."""
    pages = -(-window // PAGE)
    return TILE * (pages * PAGE + 2 * padded(head_dim)) + 2 * _LANES


def padded(head_dim: int) -> int:
    """How many numbers a key or a value takes in a page."""
    return -(-head_dim // GRAIN) * GRAIN


@njit(**KERNEL)
def _softmax(scores, at, end, low, high, lanes):
    """Scores to weights, in place: those of positions low…high−1 sum to one, the others are 0."""
    for i in range(_LANES):
        lanes[i] = MINUS_INFINITY
        lanes[_LANES + i] = ZERO
    for i in range(low):
        scores[at + i] = MINUS_INFINITY
    for i in range(high, end):
        scores[at + i] = MINUS_INFINITY
    for block in range(0, end, _LANES):
        for i in range(_LANES):
            lanes[i] = max(lanes[i], scores[at + block + i])
    top = lanes[0]
    for i in range(1, _LANES):
        top = max(top, lanes[i])
    for block in range(0, end, _LANES):
        for i in range(_LANES):
            score = scores[at + block + i]
            weight = exponential(score - top)
            weight = ZERO if score == MINUS_INFINITY else weight
            scores[at + block + i] = weight
            lanes[_LANES + i] += weight
    total = ZERO
    for i in range(_LANES):
        total += lanes[_LANES + i]
    inverse = ONE / total
    for i in range(end):
        scores[at + i] *= inverse


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


def _scores(kind: Format) -> Any:
    pointer, size = _POINTER[kind], kind.bytes
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


def _values(kind: Format) -> Any:
    pointer, size = _POINTER[kind], kind.bytes
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


@njit(**KERNEL)
def _write(key, value, strides, keys, values, table, chunk, shape):
    """Put the keys and values of a sequence's chunk where its block table says."""
    first, count, start = chunk
    heads, width, padded = shape
    for n in range(count):
        position = start + n
        page, slot = table[position // PAGE], position % PAGE
        for head in range(heads):
            from_key = (first + n) * strides[1] + head * width
            from_value = (first + n) * strides[2] + head * width
            to = (page * heads + head) * padded * PAGE
            for i in range(width):
                keys[to + i * PAGE + slot] = key[from_key + i]
            for i in range(width):
                values[to + slot * padded + i] = value[from_value + i]


def _attend_tile(kind: Format) -> Any:
    scores_of_page, values_of_page = _scores(kind), _values(kind)
    bytes_each = kind.bytes

    @njit(**KERNEL)
    @variant
    def attend_tile(tile, query, output, cache, table, after, place, looks, scratch_at):
        """Up to four queries of one KV head, from their first dot product to their output.

        tile     first of the queries among the chunk's, counting a token's heads first; how many
        after    block table and KV head of whoever is next
        place    elements from token to token in `query` and `output`; first token of the chunk and
                 its position; first query head, heads in the group, KV head, KV heads, head_dim,
                 and that padded
        """
        begin_at, size = tile
        keys_at, values_at = cache
        next_table, next_head = after
        stride, dense, first, start, first_head, group, head, heads, width, padded = place
        scale, window, softcap = looks
        outputs_at = scratch_at + 4 * TILE * padded
        lanes_at = outputs_at + 4 * TILE * padded
        scores_at = lanes_at + 8 * _LANES
        queries, outputs = float32_at(scratch_at), float32_at(outputs_at)
        lanes, scores = float32_at(lanes_at), float32_at(scores_at)
        oldest = start + begin_at // group
        newest = start + (begin_at + size - 1) // group
        begin = max(0, oldest + 1 - window) // PAGE if window > 0 else 0
        pages = newest // PAGE + 1 - begin
        row = pages * PAGE
        end = -(-(newest + 1 - begin * PAGE) // _LANES) * _LANES
        for n in range(size):
            member = begin_at + n
            at = (first + member // group) * stride + (first_head + member % group) * width
            for i in range(width):
                queries[n * padded + i] = load(query, at + i) * scale
            for i in range(width, padded):
                queries[n * padded + i] = ZERO
            for i in range(padded):
                outputs[n * padded + i] = ZERO
        page_bytes = bytes_each * padded * PAGE
        for page in range(pages):
            place_in_cache = (table[begin + page] * heads + head) * page_bytes
            keys, values = keys_at + place_in_cache, values_at + place_in_cache
            later = keys_at + (next_table[begin + page] * heads + next_head) * page_bytes
            seen = min(PAGE, newest + 1 - (begin + page) * PAGE)
            to = scores_at + 4 * page * PAGE
            scores_of_page(size, queries, padded, keys, values, later, to, row, seen)
        for n in range(size):
            if softcap > ZERO:
                for i in range(n * row, n * row + end):
                    scores[i] = softcap * tanh(scores[i] / softcap)
            position = start + (begin_at + n) // group
            low = max(0, position + 1 - window - begin * PAGE) if window > 0 else 0
            _softmax(scores, n * row, end, low, position + 1 - begin * PAGE, lanes)
        for page in range(pages):
            values = values_at + (table[begin + page] * heads + head) * page_bytes
            seen = min(PAGE, newest + 1 - (begin + page) * PAGE)
            weights = float32_at(scores_at + 4 * page * PAGE)
            values_of_page(size, weights, row, seen, values, outputs_at, padded)
        for n in range(size):
            member = begin_at + n
            at = (first + member // group) * dense + (first_head + member % group) * width
            for i in range(width):
                store(output, at + i, outputs[n * padded + i])

    return attend_tile


def _attend(kind: Format) -> Any:
    attend_tile, pointer = _attend_tile(kind), _POINTER[kind]

    @njit(**KERNEL)
    @variant
    def attend(
        tensors, strides, cache, chunks_at, chunk_count, tables_at, shape, scratch_at, looks
    ):
        query, key, value, output = (
            pointer(tensors[0]), pointer(tensors[1]), pointer(tensors[2]), pointer(tensors[3]),
        )  # fmt: skip
        keys, values = pointer(cache[0]), pointer(cache[1])
        chunks = int64_at(chunks_at)
        query_heads, heads, width, row_pages = shape
        group = query_heads // heads
        padded = -(-width // GRAIN) * GRAIN
        for number in range(chunk_count):
            first, count = chunks[4 * number], chunks[4 * number + 1]
            start, row = chunks[4 * number + 2], chunks[4 * number + 3]
            table = int64_at(tables_at + 8 * row * row_pages)
            chunk = (first, count, start)
            _write(key, value, strides, keys, values, table, chunk, (heads, width, padded))
            next_row = row if number + 1 == chunk_count else chunks[4 * number + 7]
            next_table = int64_at(tables_at + 8 * next_row * row_pages)
            for head in range(heads):
                after = (table, head + 1) if head + 1 < heads else (next_table, 0)
                place = (
                    strides[0], query_heads * width, first, start,
                    head * group, group, head, heads, width, padded,
                )  # fmt: skip
                for begin_at in range(0, count * group, TILE):
                    tile = (begin_at, min(TILE, count * group - begin_at))
                    attend_tile(tile, query, output, cache, table, after, place, looks, scratch_at)

    return attend


_attend_float32: Final = _attend(FLOAT32)
_attend_bfloat16: Final = _attend(BFLOAT16)


@njit(**KERNEL)
def attend_float32(
    tensors, strides, cache, chunks_at, chunk_count, tables_at, shape, scratch_at, looks
):
    """Write the batch's keys and values, then attend.

    tensors   addresses of query, key, value and output: rows of heads × head_dim
    strides   elements from one token's query, key, value to the next one's; output is dense
    cache     addresses of key pages and value pages
    chunks    int64 [chunks, 4]: first token in the batch, tokens, start position, table row
    tables    int64 [rows, pages]: which pages a sequence has
    shape     query heads, KV heads, head_dim, pages in a table's row
    looks     scale of the scores; how far a query sees, itself included, 0: everything before it;
              cap: scores become cap·tanh(score / cap), 0: they stay
    """
    _attend_float32(
        tensors, strides, cache, chunks_at, chunk_count, tables_at, shape, scratch_at, looks
    )


@njit(**KERNEL)
def attend_bfloat16(
    tensors, strides, cache, chunks_at, chunk_count, tables_at, shape, scratch_at, looks
):
    """As `attend_float32`, of tensors and pages in bfloat16."""
    _attend_bfloat16(
        tensors, strides, cache, chunks_at, chunk_count, tables_at, shape, scratch_at, looks
    )
