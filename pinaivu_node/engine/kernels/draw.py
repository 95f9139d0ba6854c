"""One token per row of logits on the CPU: the definition of `sampler.py`, in a few passes.

A row is scanned once for the largest logit of each block of 64.  What follows skips blocks by that:
a greedy row is done, the cut of a nucleus is found by histogram, never by sorting, and the draw is
a race.  With weight w = eˢ and noise u a token's Gumbel key s − ln(−ln u) beats the best key K only
if −ln u < w·e⁻ᴷ, hence only if 1 − u < w·e⁻ᴷ.  With the largest w of a block that compares hashes
with one number, several at a time; the few blocks and tokens that pass are looked at one by one, at
last by the definition, in double precision.

Weights are whole numbers of 2⁻⁴⁰, so sums do not depend on their order and are the same anywhere.
Nothing here may be contracted or reordered: `tensor_draw.py` must get the same bits.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-any-return"

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import njit

from pinaivu_node.engine.kernels.cut import BINS, BLOCK, EXACT, cut_by_mass, cut_by_rank, mass
from pinaivu_node.engine.kernels.memory import float32_at, int64_at
from pinaivu_node.engine.kernels.score import (
    INFINITE_KEY,
    MAGNITUDE,
    ZERO,
    exponential,
    gumbel,
    hashed,
    key_of,
    ordered,
    score_of,
    unordered,
)

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


@njit(inline="always")
def _highest(tops):
    top = tops[0]
    for block in range(1, len(tops)):
        top = max(top, tops[block])
    return unordered(top)


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
def _adjust(raw_at, row, whole, real):
    """The row with biases, penalties and the constraint."""
    raw = float32_at(raw_at)
    for i in range(len(row)):
        row[i] = raw[i]
    ids, values = int64_at(whole[IDS_AT]), float32_at(whole[VALUES_AT])
    stride = whole[VALUES_STRIDE]
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
    if whole[MASK_AT] != 0:
        _forbid(row.ctypes.data, len(row), whole[MASK_AT], whole[MASK_WORDS])


@njit(inline="always")
def _most(score, limit):
    """What the rest of a hash must not exceed for a token of this score to win; never too little.

    The rest is 1 − u in whole 2⁻²⁴, rounded down.
    """
    return np.uint64(np.float32(exponential(score) * limit))


@njit(inline="always")
def _rest(stream, token):
    return ~hashed(stream, token) >> np.uint64(40)


@njit(inline="always")
def _hits(start, count, stream, most):
    hits = np.uint64(0)
    for i in range(start, start + count):
        hits += np.uint64(_rest(stream, i) <= most)
    return hits


@njit(inline="always")
def _limit(best):
    return np.float32(math.exp(-best) * _MARGIN)


@njit(**EXACT)
def _race(x_at, width, tops, scale, first, stream, cut):
    """The token with the largest score plus noise, of those up to the cut."""
    x, (top, temperature), (last_key, last_id) = float32_at(x_at), scale, cut
    winner, best = first, gumbel(stream, first)
    limit = _limit(best)
    for block in range(len(tops)):
        highest = score_of(unordered(tops[block]), top, temperature)
        if key_of(highest) > last_key:
            continue
        start, most = block * BLOCK, _most(highest, limit)
        if start + BLOCK <= width:
            hits = _hits(start, BLOCK, stream, most)
        else:
            hits = _hits(start, width - start, stream, most)
        if hits == 0:
            continue
        for i in range(start, min(width, start + BLOCK)):
            score = score_of(x[i], top, temperature)
            key = key_of(score)
            if key > last_key or (key == last_key and i > last_id):
                continue
            if _rest(stream, i) <= _most(score, limit):
                final = np.float64(score) + gumbel(stream, i)
                if final > best or (final == best and i < winner):
                    winner, best = i, final
                    limit = _limit(best)
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
def _draw(x_at, width, tops, first, top, settings, scratch):
    whole, real = settings
    scale = (unordered(top), np.float32(real[TEMPERATURE]))
    cut = (np.int64(_INFINITE) - 1, np.int64(width))
    if 0 < whole[TOP_K] < width:
        cut = cut_by_rank(x_at, width, tops, scale, (whole[TOP_K], real[TOP_P]), scratch)
    elif real[TOP_P] < 1.0:
        cut = cut_by_mass(x_at, width, scale, real[TOP_P], scratch)
    if whole[MIN_KEY] < cut[0]:
        cut = (whole[MIN_KEY], np.int64(width))
    return _race(x_at, width, tops, scale, first, np.uint64(whole[STREAM]), cut)


@njit(**EXACT)
def _report(x_at, width, tops, wanted, scratch, out_whole, out_real):
    """What logprobs are made of, from the logits as they came."""
    highest = _highest(tops)
    out_whole[TOTAL] = mass(x_at, width, (highest, np.float32(1)), scratch[0].ctypes.data)
    out_real[HIGHEST] = highest
    out_real[CHOSEN] = float32_at(x_at)[out_whole[TOKEN]]
    if wanted > 0:
        out_whole[LISTED] = _likeliest(
            x_at, width, tops, wanted, out_whole[LIST:], out_real[OUT_REAL_LIST:]
        )


@njit(**EXACT)
def draw(logits_at, width, whole, real, out_whole, out_real):
    """A token for each row of logits; `whole` and `real` say how, the others take what came out.

    Temperature 0 takes the likeliest.  The caller has checked every shape, id and address, and has
    filled what comes out with zeros.
    """
    blocks = (width + BLOCK - 1) // BLOCK
    tops, raw_tops = np.empty(blocks, np.int32), np.empty(blocks, np.int32)
    # Whose addresses are passed on must be held by a name that outlives that.
    adjusted = np.empty(width, np.float32)
    scratch = (
        np.empty(width, np.float32),
        (np.empty(width, np.int32), np.empty(width, np.int64), np.empty(width, np.int64)),
        np.empty(BINS, np.int64),
    )
    for row in range(len(whole)):
        raw_at = logits_at + row * width * 4
        x_at, row_tops = raw_at, raw_tops
        top, good = _scan(raw_at, width, raw_tops)
        if good and (whole[row, ADJUSTED] > 0 or whole[row, MASK_AT] != 0):
            x_at, row_tops = adjusted.ctypes.data, tops
            _adjust(raw_at, adjusted, whole[row], real[row])
            top, good = _scan(x_at, width, tops)
        if not good:
            out_whole[row, STATUS] = NOT_FINITE
            continue
        if top <= _MINUS_INFINITE:
            out_whole[row, STATUS] = NONE_ALLOWED
            continue
        token = _first(x_at, width, row_tops, top)
        if real[row, TEMPERATURE] > 0.0:
            settings = (whole[row], real[row])
            token = _draw(x_at, width, row_tops, token, top, settings, scratch)
        out_whole[row, TOKEN] = token
        wanted = whole[row, REPORTED]
        if wanted >= 0:
            _report(raw_at, width, raw_tops, wanted, scratch, out_whole[row], out_real[row])
