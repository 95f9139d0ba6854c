"""One token per row of logits on the CPU: the definition of `sampling.py`, in a few passes.

A row is scanned once for the largest logit of each block of 64.  What follows skips blocks by that:
a greedy row is done, the cut of a nucleus is found by histogram, never by sorting, and the draw is
a race.  With weight w = eˢ and noise u a token's Gumbel key s − ln(−ln u) beats the best key K only
if −ln u < w·e⁻ᴷ, hence only if 1 − u < w·e⁻ᴷ.  That compares one hash with one product, eight or
sixteen tokens at a time; the few that pass are decided by the definition, in double precision.

Weights are whole numbers of 2⁻⁴⁰, so sums do not depend on their order and are the same anywhere.
Nothing here may be contracted or reordered: `tensor_draw.py` must get the same bits.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-any-return"

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import njit

from pinaivu_node.engine.kernels.memory import float32_at, int64_at
from pinaivu_node.engine.kernels.score import (
    INFINITE_KEY,
    MAGNITUDE,
    WEIGHT_BITS,
    ZERO,
    exponential,
    gumbel,
    hashed,
    key_of,
    ordered,
    score_of,
    unordered,
    weight_of,
)

EXACT: Final[dict[str, Any]] = {"cache": True, "nogil": True, "error_model": "numpy"}

BLOCK: Final = 64
MAX_TOP: Final = 20
"""Alternatives that may be reported."""

# Columns of the tables that a caller fills and reads; one row per sequence.
STREAM: Final = 0
TOP_K: Final = 1
MIN_KEY: Final = 2
REPORTED: Final = 3
MASK_AT: Final = 4
MASK_WORDS: Final = 5
ADJUSTED: Final = 6
IDS_AT: Final = 7
VALUES_AT: Final = 8
VALUES_STRIDE: Final = 9
WHOLE_COLUMNS: Final = 10

TEMPERATURE: Final = 0
TOP_P: Final = 1
REPETITION: Final = 2
FREQUENCY: Final = 3
PRESENCE: Final = 4
REAL_COLUMNS: Final = 5

STATUS: Final = 0
TOKEN: Final = 1
TOTAL: Final = 2
LISTED: Final = 3
LIST: Final = 4
OUT_WHOLE_COLUMNS: Final = LIST + MAX_TOP

HIGHEST: Final = 0
CHOSEN: Final = 1
OUT_REAL_LIST: Final = 2
OUT_REAL_COLUMNS: Final = OUT_REAL_LIST + MAX_TOP

FINE: Final = 0
NOT_FINITE: Final = 1
NONE_ALLOWED: Final = 2

_INFINITE: Final = np.int32(INFINITE_KEY)
_MINUS_INFINITE: Final = np.int32(-0x7F800001)  # `ordered` of it
_SMALLEST: Final = np.int32(-0x80000000)
_MARGIN: Final = 1.0001 * 2.0**24
"""The float32 product of a quick test is right to 10⁻⁶; a token within 10⁻⁴ is looked at twice."""
_BINS: Final = 2048
_BINS_PER_NAT: Final = np.float32(64)
_WEIGHTLESS: Final = -28.0
"""Under this score a weight is less than 2⁻⁴⁰."""


@njit(inline="always")
def _block_top(x, start, count):
    top, magnitude = _SMALLEST, np.int32(0)
    for i in range(start, start + count):
        top = max(top, ordered(x[i]))
        magnitude = max(magnitude, np.int32(np.float32(x[i]).view(np.int32) & MAGNITUDE))
    return top, magnitude


@njit(**EXACT)
def _scan(x_at, width, tops):
    """Fill in each block's largest; return the largest of all and whether no number is bad."""
    x = float32_at(x_at)
    top, magnitude = _SMALLEST, np.int32(0)
    for block in range(width // BLOCK):
        highest, large = _block_top(x, block * BLOCK, BLOCK)
        tops[block] = highest
        top, magnitude = max(top, highest), max(magnitude, large)
    if width % BLOCK:
        block = width // BLOCK
        highest, large = _block_top(x, block * BLOCK, width % BLOCK)
        tops[block] = highest
        top, magnitude = max(top, highest), max(magnitude, large)
    return top, magnitude <= _INFINITE and top < _INFINITE


@njit(**EXACT)
def _first(x_at, width, tops, top):
    """The lowest id whose logit is the largest."""
    x = float32_at(x_at)
    for block in range(len(tops)):
        if tops[block] == top:
            for i in range(block * BLOCK, min(width, (block + 1) * BLOCK)):
                if ordered(x[i]) == top:
                    return i
    return -1


@njit(**EXACT)
def _adjust(row, whole, real):
    """Bias and penalties of the tokens that have any, in place."""
    ids, values, stride = (
        int64_at(whole[IDS_AT]),
        float32_at(whole[VALUES_AT]),
        whole[VALUES_STRIDE],
    )
    repetition, frequency = np.float32(real[REPETITION]), np.float32(real[FREQUENCY])
    presence = np.float32(real[PRESENCE])
    for j in range(whole[ADJUSTED]):
        x = np.float32(row[ids[j]] + values[j])
        count = values[stride + j]
        if values[2 * stride + j] > ZERO:
            x = np.float32(x / repetition) if x > ZERO else np.float32(x * repetition)
        x = np.float32(x - np.float32(frequency * count))
        if count > ZERO:
            x = np.float32(x - presence)
        row[ids[j]] = x


@njit(**EXACT)
def _forbid(row_at, width, words_at, words):
    """Minus infinity for every token whose bit is not set, or that has none."""
    row, mask = float32_at(row_at), float32_at(words_at)
    for word in range((width + 31) // 32):
        allowed = np.float32(mask[word]).view(np.int32) if word < words else np.int32(0)
        if allowed == np.int32(-1):
            continue
        start = word * 32
        for j in range(min(32, width - start)):
            if not np.int32(np.int32(allowed >> np.int32(j)) & np.int32(1)):
                row[start + j] = np.float32(-np.inf)


@njit(**EXACT)
def mass(x_at, width, top, temperature):
    """All weights together."""
    x = float32_at(x_at)
    total = np.int64(0)
    for i in range(width):
        total += weight_of(score_of(x[i], top, temperature))
    return total


@njit(**EXACT)
def _select(keys, weights, count, need, histogram):
    """The key at which weights, summed up in ascending order of keys, reach `need`.

    Returned with how many of those that have this very key are needed.  All of them weigh the same.
    """
    prefix, before = np.int64(0), np.int64(0)
    tied = np.int64(1)
    for level in range(3):
        shift, bits = 20 - 10 * level, 11 if level == 0 else 10
        histogram[: 1 << bits] = 0
        for j in range(count):
            key = np.int64(keys[j])
            if key >> (shift + bits) == prefix:
                histogram[(key >> shift) & ((1 << bits) - 1)] += weights[j]
        at = 0
        while before + histogram[at] < need:
            before += histogram[at]
            at += 1
        prefix = (prefix << bits) | at
    for j in range(count):
        if keys[j] == prefix:
            tied = weights[j]
            break
    return prefix, (need - before + tied - 1) // tied


@njit(**EXACT)
def _id_of_tie(keys, ids, count, key, rank):
    for j in range(count):
        if keys[j] == key:
            rank -= 1
            if rank == 0:
                return np.int64(ids[j])
    return np.int64(-1)


@njit(inline="always")
def _needed(top_p, total):
    return min(max(np.int64(math.ceil(top_p * np.float64(total))), np.int64(1)), total)


@njit(**EXACT)
def _cut_by_rank(x_at, width, tops, scale, real, top_k, lists, histogram):
    """The last (key, id) of the top_k likeliest, and of these of the nucleus."""
    x, (top, temperature) = float32_at(x_at), scale
    keys, ids, weights = lists
    bound = np.int64(_INFINITE) - 1
    if top_k <= len(tops):
        # As many blocks hold a token at least as likely as the k-th best of the blocks' best.
        for block in range(len(tops)):
            keys[block] = key_of(score_of(unordered(tops[block]), top, temperature))
            weights[block] = 1
        bound = min(bound, _select(keys, weights, len(tops), top_k, histogram)[0])
    count = 0
    for block in range(len(tops)):
        if key_of(score_of(unordered(tops[block]), top, temperature)) <= bound:
            for i in range(block * BLOCK, min(width, (block + 1) * BLOCK)):
                key = key_of(score_of(x[i], top, temperature))
                if key <= bound:
                    keys[count], ids[count], weights[count] = key, i, 1
                    count += 1
    key, rank = _select(keys, weights, count, min(top_k, count), histogram)
    last = _id_of_tie(keys, ids, count, key, rank)
    if real[TOP_P] >= 1.0:
        return key, last
    kept, total = 0, np.int64(0)
    for j in range(count):
        if keys[j] < key or (keys[j] == key and ids[j] <= last):
            weight = weight_of(-np.int32(keys[j]).view(np.float32))
            keys[kept], ids[kept], weights[kept] = keys[j], ids[j], weight
            total += weight
            kept += 1
    key, rank = _select(keys, weights, kept, _needed(real[TOP_P], total), histogram)
    return key, _id_of_tie(keys, ids, kept, key, rank)


@njit(inline="always")
def _bin(score):
    return min(np.int64(np.float32(-score * _BINS_PER_NAT)), np.int64(_BINS - 1))


@njit(**EXACT)
def _cut_by_mass(x_at, width, tops, scale, real, lists, histogram):
    """The last (key, id) of the fewest tokens that hold top_p of all weight."""
    x, (top, temperature) = float32_at(x_at), scale
    keys, ids, weights = lists
    total = mass(x_at, width, top, temperature)
    need = _needed(real[TOP_P], total)
    # Tokens under `bound` together weigh less than what the nucleus leaves out.
    left_out = (1.0 - real[TOP_P]) * (np.float64(total) * 2.0**-WEIGHT_BITS) / width
    bound = np.float32(_WEIGHTLESS)
    if left_out > 1e-9:
        bound = max(bound, np.float32(math.log(left_out) - 0.001))
    histogram[:] = 0
    for block in range(len(tops)):
        if score_of(unordered(tops[block]), top, temperature) >= bound:
            for i in range(block * BLOCK, min(width, (block + 1) * BLOCK)):
                score = score_of(x[i], top, temperature)
                if score >= bound:
                    histogram[_bin(score)] += weight_of(score)
    at, before = 0, np.int64(0)
    while before + histogram[at] < need:
        before += histogram[at]
        at += 1
    count = 0
    for block in range(len(tops)):
        if _bin(max(score_of(unordered(tops[block]), top, temperature), bound)) <= at:
            for i in range(block * BLOCK, min(width, (block + 1) * BLOCK)):
                score = score_of(x[i], top, temperature)
                if score >= bound and _bin(score) == at:
                    keys[count], ids[count], weights[count] = key_of(score), i, weight_of(score)
                    count += 1
    key, rank = _select(keys, weights, count, need - before, histogram)
    return key, _id_of_tie(keys, ids, count, key, rank)


@njit(inline="always")
def _may_win(x, scale, stream, token, limit):
    """Whether a token could be the best one so far; never wrong when it says no."""
    weight = exponential(score_of(x, scale[0], scale[1]))
    rest = np.int32(~hashed(stream, token) >> np.uint64(40))
    return np.float32(rest) <= np.float32(weight * limit)


@njit(inline="always")
def _hits(x, start, count, scale, stream, limit):
    hits = np.int32(0)
    for i in range(start, start + count):
        hits += np.int32(_may_win(x[i], scale, stream, i, limit))
    return hits


@njit(**EXACT)
def _race(x_at, width, tops, scale, first, stream, cut):
    """The token with the largest score plus noise, of those up to the cut."""
    x, (top, temperature), (last_key, last_id) = float32_at(x_at), scale, cut
    winner, best = first, gumbel(stream, first)
    limit = np.float32(math.exp(-best) * _MARGIN)
    for block in range(len(tops)):
        if key_of(score_of(unordered(tops[block]), top, temperature)) > last_key:
            continue
        start = block * BLOCK
        if start + BLOCK <= width:
            hits = _hits(x, start, BLOCK, scale, stream, limit)
        else:
            hits = _hits(x, start, width - start, scale, stream, limit)
        if hits == 0:
            continue
        for i in range(start, min(width, start + BLOCK)):
            if not _may_win(x[i], scale, stream, i, limit):
                continue
            score = score_of(x[i], top, temperature)
            key = key_of(score)
            if key < last_key or (key == last_key and i <= last_id):
                final = np.float64(score) + gumbel(stream, i)
                if final > best or (final == best and i < winner):
                    winner, best = i, final
                    limit = np.float32(math.exp(-best) * _MARGIN)
    return winner


@njit(**EXACT)
def _likeliest(x_at, width, tops, wanted, ids, values):
    """The likeliest tokens, most likely first, the lower id first of equals; how many there are."""
    x = float32_at(x_at)
    count = 0
    for block in range(len(tops)):
        if count == wanted and np.float64(unordered(tops[block])) <= values[count - 1]:
            continue
        for i in range(block * BLOCK, min(width, (block + 1) * BLOCK)):
            value = np.float64(x[i])
            if value == -np.inf or (count == wanted and value <= values[count - 1]):
                continue
            at = count if count < wanted else count - 1
            while at > 0 and values[at - 1] < value:
                ids[at], values[at] = ids[at - 1], values[at - 1]
                at -= 1
            ids[at], values[at] = i, value
            count = min(count + 1, wanted)
    return count


@njit(**EXACT)
def _draw(x_at, width, tops, first, top, whole, real, lists, histogram):
    temperature = np.float32(real[TEMPERATURE])
    scale = (unordered(top), temperature)
    cut = (np.int64(_INFINITE) - 1, np.int64(width))
    if 0 < whole[TOP_K] < width:
        cut = _cut_by_rank(x_at, width, tops, scale, real, whole[TOP_K], lists, histogram)
    elif real[TOP_P] < 1.0:
        cut = _cut_by_mass(x_at, width, tops, scale, real, lists, histogram)
    if whole[MIN_KEY] < cut[0]:
        cut = (whole[MIN_KEY], np.int64(width))
    return _race(x_at, width, tops, scale, first, np.uint64(whole[STREAM]), cut)


@njit(**EXACT)
def draw(logits_at, width, whole, real, out_whole, out_real):
    """A token for each row of logits; `whole` and `real` say how, the others take what came out.

    Temperature 0 takes the likeliest.  The caller has checked every shape, id and address.
    """
    blocks = (width + BLOCK - 1) // BLOCK
    tops, raw_tops = np.empty(blocks, np.int32), np.empty(blocks, np.int32)
    lists = (np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.int64))
    histogram, adjusted = np.empty(_BINS, np.int64), np.empty(width, np.float32)
    for row in range(len(whole)):
        raw_at = logits_at + row * width * 4
        raw = float32_at(raw_at)
        x_at, row_tops = raw_at, raw_tops
        raw_top, good = _scan(raw_at, width, raw_tops)
        top = raw_top
        if good and (whole[row, ADJUSTED] > 0 or whole[row, MASK_AT] != 0):
            x_at, row_tops = adjusted.ctypes.data, tops
            for i in range(width):
                adjusted[i] = raw[i]
            _adjust(adjusted, whole[row], real[row])
            if whole[row, MASK_AT] != 0:
                _forbid(x_at, width, whole[row, MASK_AT], whole[row, MASK_WORDS])
            top, good = _scan(x_at, width, tops)
        if not good:
            out_whole[row, STATUS] = NOT_FINITE
            continue
        if top <= _MINUS_INFINITE:
            out_whole[row, STATUS] = NONE_ALLOWED
            continue
        token = _first(x_at, width, row_tops, top)
        if real[row, TEMPERATURE] > 0.0:
            token = _draw(
                x_at, width, row_tops, token, top, whole[row], real[row], lists, histogram
            )
        out_whole[row, STATUS], out_whole[row, TOKEN] = FINE, token
        if whole[row, REPORTED] >= 0:
            highest = unordered(raw_top)
            out_whole[row, TOTAL] = mass(raw_at, width, highest, np.float32(1))
            out_real[row, HIGHEST], out_real[row, CHOSEN] = highest, raw[token]
            out_whole[row, LISTED] = 0
            if whole[row, REPORTED] > 0:
                out_whole[row, LISTED] = _likeliest(
                    raw_at, width, raw_tops, whole[row, REPORTED],
                    out_whole[row, LIST:], out_real[row, OUT_REAL_LIST:],
                )  # fmt: skip
