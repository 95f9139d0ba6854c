"""Attention over a paged KV cache, for decode and prefill alike, on one CPU core.

Theory of operation.  A batch is a packed list of tokens: for each sequence the next token, or a
chunk of its prompt.  `attend` first writes the keys and values of all tokens into their pages, then
lets every query look at the positions up to its own.  A page holds `PAGE` positions of one KV head,
keys as [head_dim, PAGE] and values as [PAGE, head_dim]: then both products run along contiguous
memory, the scores of 64 positions at a time and a value's row at a time.  Since the kernel walks
the block table itself, pages cost nothing over contiguous rows (gathering them for a matrix product
would double the work).

Up to four queries are worked on together, so that what is in registers is used four times: the
heads of a group in decode, heads and tokens in prefill.  Up to thirty-two look at a page before the
next page is turned to, so that what is read from memory is used as often.

Every sum is taken in an order given by positions and dimensions alone: scores over dimensions in
order, weights over positions in sixteen lanes by position, values over positions in order.  Masked
positions add an exact zero.  So a token's output is the same to the bit whether it was computed in
decode or in a chunk of any length, and whoever else was in the batch.
"""

from __future__ import annotations

from typing import Any, Final

from numba import njit

from pinaivu_node.engine.kernels import attention_tiles
from pinaivu_node.engine.kernels.arithmetic import MINUS_INFINITY, ONE, ZERO, exponential, tanh
from pinaivu_node.engine.kernels.attention_tiles import PAGE, POINTER, TILE
from pinaivu_node.engine.kernels.memory import (
    KERNEL,
    float32_at,
    int64_at,
    load,
    store,
    variant,
)
from pinaivu_node.engine.kernels.vectors import BFLOAT16, FLOAT32, Format

BLOCK: Final = 32
"""Queries that look at a page one tile after another, while it is in the nearest cache."""
GRAIN: Final = 16
"""Keys and values are padded with zeros to a multiple of it: the widest vector."""
_LANES: Final = 16
"""Of a softmax: partial sums, by position modulo this."""


def scratch_floats(*, window: int, head_dim: int) -> int:
    """How many float32 numbers of scratch memory `attend` needs for positions below `window`."""
    pages = -(-window // PAGE)
    return BLOCK * (pages * PAGE + 2 * padded(head_dim)) + 2 * _LANES


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


@njit(**KERNEL)
def _take_in(block, query, queries, outputs, place, scale):
    """A block's queries to scaled and padded rows of their own; their outputs begin at zero."""
    begin_at, size = block
    stride, _, first, _, first_head, group, _, _, width, padded = place
    for n in range(size):
        member = begin_at + n
        at = (first + member // group) * stride + (first_head + member % group) * width
        for i in range(width):
            queries[n * padded + i] = load(query, at + i) * scale
        for i in range(width, padded):
            queries[n * padded + i] = ZERO
        for i in range(padded):
            outputs[n * padded + i] = ZERO


@njit(**KERNEL)
def _give_out(block, outputs, output, place):
    """The opposite, of outputs."""
    begin_at, size = block
    _, dense, first, _, first_head, group, _, _, width, padded = place
    for n in range(size):
        member = begin_at + n
        at = (first + member // group) * dense + (first_head + member % group) * width
        for i in range(width):
            store(output, at + i, outputs[n * padded + i])


def _attend_block(kind: Format) -> Any:
    scores_of_page, values_of_page = attention_tiles.scores(kind), attention_tiles.values(kind)
    bytes_each = kind.bytes

    @njit(**KERNEL)
    @variant
    def attend_block(block, query, output, cache, table, after, place, looks, scratch_at):
        """Some queries of one KV head, from their first dot product to their output.

        block    first of the queries among the chunk's, counting a token's heads first; how many
        after    block table and KV head of whoever is next
        place    elements from token to token in `query` and `output`; first token of the chunk and
                 its position; first query head, heads in the group, KV head, KV heads, head_dim,
                 and that padded
        """
        begin_at, size = block
        keys_at, values_at = cache
        next_table, next_head = after
        _, _, _, start, _, group, head, heads, _, padded = place
        scale, window, softcap = looks
        outputs_at = scratch_at + 4 * BLOCK * padded
        lanes_at = outputs_at + 4 * BLOCK * padded
        scores_at = lanes_at + 8 * _LANES
        queries, outputs = float32_at(scratch_at), float32_at(outputs_at)
        lanes, scores = float32_at(lanes_at), float32_at(scores_at)
        oldest = start + begin_at // group
        newest = start + (begin_at + size - 1) // group
        begin = max(0, oldest + 1 - window) // PAGE if window > 0 else 0
        pages = newest // PAGE + 1 - begin
        row = pages * PAGE
        _take_in(block, query, queries, outputs, place, scale)
        page_bytes = bytes_each * padded * PAGE
        for page in range(pages):
            place_in_cache = (table[begin + page] * heads + head) * page_bytes
            keys, values = keys_at + place_in_cache, values_at + place_in_cache
            later = keys_at + (next_table[begin + page] * heads + next_head) * page_bytes
            for n in range(0, size, TILE):
                tile = min(TILE, size - n)
                last = start + (begin_at + n + tile - 1) // group
                seen = min(PAGE, last + 1 - (begin + page) * PAGE)
                asking = float32_at(scratch_at + 4 * n * padded)
                to = scores_at + 4 * (n * row + page * PAGE)
                scores_of_page(tile, asking, padded, keys, values, later, to, row, seen)
        for n in range(size):
            position = start + (begin_at + n) // group
            low = max(0, position + 1 - window - begin * PAGE) if window > 0 else 0
            high = position + 1 - begin * PAGE
            # To the end of what its tile looked at.
            last = start + (begin_at + min(size, n // TILE * TILE + TILE) - 1) // group
            end = -(-(last + 1 - begin * PAGE) // _LANES) * _LANES
            if softcap > ZERO:
                for i in range(n * row, n * row + end):
                    scores[i] = softcap * tanh(scores[i] / softcap)
            _softmax(scores, n * row, end, low, high, lanes)
        for page in range(pages):
            values = values_at + (table[begin + page] * heads + head) * page_bytes
            for n in range(0, size, TILE):
                tile = min(TILE, size - n)
                last = start + (begin_at + n + tile - 1) // group
                seen = min(PAGE, last + 1 - (begin + page) * PAGE)
                weights = float32_at(scores_at + 4 * (n * row + page * PAGE))
                sums = outputs_at + 4 * n * padded
                values_of_page(tile, weights, row, seen, values, sums, padded)
        _give_out(block, outputs, output, place)

    return attend_block


def _attend(kind: Format) -> Any:
    attend_block, pointer = _attend_block(kind), POINTER[kind]

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
                for begin_at in range(0, count * group, BLOCK):
                    block = (begin_at, min(BLOCK, count * group - begin_at))
                    attend_block(
                        block, query, output, cache, table, after, place, looks, scratch_at
                    )

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
