"""Attention over a paged KV cache, for decode and prefill alike, on one CPU core.

Theory of operation.  A batch is a packed list of tokens: for each sequence the next token, or a
chunk of its prompt.  `attend` first writes the keys and values of all tokens into their pages, then
lets every query look at the positions up to its own.  A page holds `PAGE` positions of one KV head,
keys as [head_dim, PAGE] and values as [PAGE, head_dim]: then both products run along contiguous
memory, a key's score of 64 positions at a time and a value's row at a time.  Since the kernel walks
the block table itself, pages cost nothing over contiguous rows (gathering them for a matrix product
would double the work).

Four queries are worked on together, so that what is read from the cache is used four times: the
heads of a group in decode, heads and tokens in prefill.

Every sum is taken in an order given by positions and dimensions alone: scores over dimensions in
order, weights over positions in sixteen lanes by position, values over positions in order.  Masked
positions add an exact zero.  So a token's output is the same to the bit whether it was computed in
decode or in a chunk of any length, and whoever else was in the batch.
"""

from __future__ import annotations

from typing import Final

from numba import njit

from pinaivu_node.engine.kernels.arithmetic import MINUS_INFINITY, ONE, ZERO, exponential, tanh
from pinaivu_node.engine.kernels.memory import (
    KERNEL,
    bfloat16_at,
    float32_at,
    int64_at,
    load,
    store,
)

PAGE: Final = 64
"""Positions per page: sixteen vectors of AVX, and fine enough to share short prefixes."""
TILE: Final = 4
"""Queries worked on together."""
_LANES: Final = 16


def scratch_floats(*, window: int, head_dim: int) -> int:
    """How many float32 numbers of scratch memory `attend` needs for positions below `window`."""
    pages = -(-window // PAGE)
    return TILE * (pages * PAGE + 2 * head_dim) + 2 * _LANES


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
def _scores_of_page(query, width, keys, page_at, scores, to, stride, count):
    """scores[to + tile·stride + i] = query[tile] · key[i] for the first keys of a page."""
    a, b, c, d = to, to + stride, to + 2 * stride, to + 3 * stride
    for i in range(count):
        scores[a + i] = ZERO
        scores[b + i] = ZERO
        scores[c + i] = ZERO
        scores[d + i] = ZERO
    for at in range(0, width, 4):
        qa, qb, qc, qd = at, at + width, at + 2 * width, at + 3 * width
        a0, a1, a2, a3 = query[qa], query[qa + 1], query[qa + 2], query[qa + 3]
        b0, b1, b2, b3 = query[qb], query[qb + 1], query[qb + 2], query[qb + 3]
        c0, c1, c2, c3 = query[qc], query[qc + 1], query[qc + 2], query[qc + 3]
        d0, d1, d2, d3 = query[qd], query[qd + 1], query[qd + 2], query[qd + 3]
        key = page_at + at * PAGE
        for i in range(count):
            k0 = load(keys, key + i)
            k1 = load(keys, key + PAGE + i)
            k2 = load(keys, key + 2 * PAGE + i)
            k3 = load(keys, key + 3 * PAGE + i)
            scores[a + i] = scores[a + i] + a0 * k0 + a1 * k1 + a2 * k2 + a3 * k3
            scores[b + i] = scores[b + i] + b0 * k0 + b1 * k1 + b2 * k2 + b3 * k3
            scores[c + i] = scores[c + i] + c0 * k0 + c1 * k1 + c2 * k2 + c3 * k3
            scores[d + i] = scores[d + i] + d0 * k0 + d1 * k1 + d2 * k2 + d3 * k3


@njit(**KERNEL)
def _values_of_page(weights, at, stride, count, values, page_at, output, width):
    """output[tile] += Σ weight[tile, i] · value[i] over the first `count` of a page."""
    oa, ob, oc, od = 0, width, 2 * width, 3 * width
    whole = count - count % 4
    for i in range(0, whole, 4):
        wa, wb, wc, wd = at + i, at + stride + i, at + 2 * stride + i, at + 3 * stride + i
        a0, a1, a2, a3 = weights[wa], weights[wa + 1], weights[wa + 2], weights[wa + 3]
        b0, b1, b2, b3 = weights[wb], weights[wb + 1], weights[wb + 2], weights[wb + 3]
        c0, c1, c2, c3 = weights[wc], weights[wc + 1], weights[wc + 2], weights[wc + 3]
        d0, d1, d2, d3 = weights[wd], weights[wd + 1], weights[wd + 2], weights[wd + 3]
        value = page_at + i * width
        for j in range(width):
            v0 = load(values, value + j)
            v1 = load(values, value + width + j)
            v2 = load(values, value + 2 * width + j)
            v3 = load(values, value + 3 * width + j)
            output[oa + j] = output[oa + j] + a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
            output[ob + j] = output[ob + j] + b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
            output[oc + j] = output[oc + j] + c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
            output[od + j] = output[od + j] + d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3
    for i in range(whole, count):
        a0, b0 = weights[at + i], weights[at + stride + i]
        c0, d0 = weights[at + 2 * stride + i], weights[at + 3 * stride + i]
        value = page_at + i * width
        for j in range(width):
            v0 = load(values, value + j)
            output[oa + j] = output[oa + j] + a0 * v0
            output[ob + j] = output[ob + j] + b0 * v0
            output[oc + j] = output[oc + j] + c0 * v0
            output[od + j] = output[od + j] + d0 * v0


@njit(**KERNEL)
def _write(key, value, strides, keys, values, table, chunk, shape):
    """Put the keys and values of a sequence's chunk where its block table says."""
    first, count, start = chunk
    heads, width = shape
    for n in range(count):
        position = start + n
        page, slot = table[position // PAGE], position % PAGE
        for head in range(heads):
            from_key = (first + n) * strides[1] + head * width
            from_value = (first + n) * strides[2] + head * width
            to = (page * heads + head) * width * PAGE
            for i in range(width):
                keys[to + i * PAGE + slot] = key[from_key + i]
            for i in range(width):
                values[to + slot * width + i] = value[from_value + i]


@njit(**KERNEL)
def _attend_tile(tile, query, output, keys, values, table, place, looks, scratch):
    """Up to four queries of one KV head, from their first dot product to their output.

    tile       first of the queries among the chunk's, counting a token's heads first; how many
    place      elements from token to token in `query` and `output`; first token of the chunk and
               its position; first query head, heads in the group, KV head, KV heads, head_dim
    """
    begin_at, size = tile
    stride, dense, first, start, first_head, group, head, heads, width = place
    scale, window, softcap = looks
    queries, outputs, lanes, scores = scratch
    oldest = start + begin_at // group
    newest = start + (begin_at + size - 1) // group
    begin = max(0, oldest + 1 - window) // PAGE if window > 0 else 0
    pages = newest // PAGE + 1 - begin
    end = pages * PAGE
    for n in range(TILE):
        member = begin_at + min(n, size - 1)  # a tile that is not full repeats its last query
        at = (first + member // group) * stride + (first_head + member % group) * width
        for i in range(width):
            queries[n * width + i] = load(query, at + i) * scale
            outputs[n * width + i] = ZERO
    for page in range(pages):
        page_at = (table[begin + page] * heads + head) * width * PAGE
        seen = min(PAGE, newest + 1 - (begin + page) * PAGE)
        whole_lanes = -(-seen // _LANES) * _LANES
        _scores_of_page(queries, width, keys, page_at, scores, page * PAGE, end, whole_lanes)
    if softcap > ZERO:
        for i in range(TILE * end):
            scores[i] = softcap * tanh(scores[i] / softcap)
    for n in range(TILE):
        position = start + (begin_at + min(n, size - 1)) // group
        low = max(0, position + 1 - window - begin * PAGE) if window > 0 else 0
        _softmax(scores, n * end, end, low, position + 1 - begin * PAGE, lanes)
    for page in range(pages):
        page_at = (table[begin + page] * heads + head) * width * PAGE
        seen = min(PAGE, newest + 1 - (begin + page) * PAGE)
        _values_of_page(scores, page * PAGE, end, seen, values, page_at, outputs, width)
    for n in range(size):
        member = begin_at + n
        at = (first + member // group) * dense + (first_head + member % group) * width
        for i in range(width):
            store(output, at + i, outputs[n * width + i])


@njit(**KERNEL)
def _attend(tensors, strides, cache, chunks, chunk_count, tables_at, shape, scratch_at, looks):
    query, key, value, output = tensors
    keys, values = cache
    query_heads, heads, width, row_pages = shape
    group = query_heads // heads
    scratch = (
        float32_at(scratch_at),
        float32_at(scratch_at + 4 * TILE * width),
        float32_at(scratch_at + 4 * TILE * 2 * width),
        float32_at(scratch_at + 4 * (TILE * 2 * width + 2 * _LANES)),
    )
    for number in range(chunk_count):
        first, count = chunks[4 * number], chunks[4 * number + 1]
        start, row = chunks[4 * number + 2], chunks[4 * number + 3]
        table = int64_at(tables_at + 8 * row * row_pages)
        chunk = (first, count, start)
        _write(key, value, strides, keys, values, table, chunk, (heads, width))
        for head in range(heads):
            place = (
                strides[0], query_heads * width, first, start,
                head * group, group, head, heads, width,
            )  # fmt: skip
            for begin_at in range(0, count * group, TILE):
                tile = (begin_at, min(TILE, count * group - begin_at))
                _attend_tile(tile, query, output, keys, values, table, place, looks, scratch)


@njit(**KERNEL)
def attend_float32(
    tensors_at, strides, cache_at, chunks_at, chunk_count, tables_at, shape, scratch_at, looks
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
    query_at, key_at, value_at, output_at = tensors_at
    tensors = float32_at(query_at), float32_at(key_at), float32_at(value_at), float32_at(output_at)
    cache = float32_at(cache_at[0]), float32_at(cache_at[1])
    chunks = int64_at(chunks_at)
    _attend(tensors, strides, cache, chunks, chunk_count, tables_at, shape, scratch_at, looks)


@njit(**KERNEL)
def attend_bfloat16(
    tensors_at, strides, cache_at, chunks_at, chunk_count, tables_at, shape, scratch_at, looks
):
    """As `attend_float32`, of tensors and pages in bfloat16."""
    query_at, key_at, value_at, output_at = tensors_at
    query, key = bfloat16_at(query_at), bfloat16_at(key_at)
    tensors = query, key, bfloat16_at(value_at), bfloat16_at(output_at)
    cache = bfloat16_at(cache_at[0]), bfloat16_at(cache_at[1])
    chunks = int64_at(chunks_at)
    _attend(tensors, strides, cache, chunks, chunk_count, tables_at, shape, scratch_at, looks)
