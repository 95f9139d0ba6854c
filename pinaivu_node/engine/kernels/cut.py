"""Where a row's likely tokens end: by rank, or by how much weight they hold; nothing is sorted.

A cut is the last token that stays, as its key and its id: lower keys are likelier, and of equal
keys the lower id goes first.  Blocks of the row whose best token is out are skipped.  `scratch` is
room for a row's exponentials, for three lists of tokens, and for a histogram.
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
    WEIGHT_BITS,
    exponential,
    key_of,
    score_of,
    unordered,
    weight_of,
    whole,
)

EXACT: Final[dict[str, Any]] = {"cache": True, "nogil": True, "error_model": "numpy"}
"""How kernels of a draw are compiled: every operation rounded, none fused or reordered."""
BLOCK: Final = 64
BINS: Final = 2048

_BINS_PER_NAT: Final = np.float32(64)
_LAST_BIN: Final = np.float32(BINS - 1)


@njit(**EXACT)
def mass(x_at, width, scale, exponentials_at):
    """All weights together; the exponentials of all scores are left where they are wanted."""
    x, out, (top, temperature) = float32_at(x_at), float32_at(exponentials_at), scale
    # Two loops: in one the integers' width would halve how many floats are done at a time.
    for i in range(width):
        out[i] = exponential(score_of(x[i], top, temperature))
    total = np.int64(0)
    for i in range(width):
        total += whole(out[i])
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
def _cut_of_list(lists, count, need, histogram):
    keys, ids, weights = lists
    key, rank = _select(keys, weights, count, need, histogram)
    for j in range(count):
        if keys[j] == key:
            rank -= 1
            if rank == 0:
                return key, np.int64(ids[j])
    return key, np.int64(-1)


@njit(inline="always")
def _needed(top_p, total):
    return min(max(np.int64(math.ceil(top_p * np.float64(total))), np.int64(1)), total)


@njit(**EXACT)
def cut_by_rank(x_at, width, tops, scale, limits, scratch):
    """The cut after the `top_k` likeliest, or after those of them that hold `top_p` of theirs."""
    x, (top, temperature), (top_k, top_p) = float32_at(x_at), scale, limits
    _, lists, histogram = scratch
    keys, ids, weights = lists
    bound = np.int64(INFINITE_KEY - 1)
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
    key, last = _cut_of_list(lists, count, min(top_k, count), histogram)
    if top_p >= 1.0:
        return key, last
    kept, total = 0, np.int64(0)
    for j in range(count):
        if keys[j] < key or (keys[j] == key and ids[j] <= last):
            weight = weight_of(-np.int32(keys[j]).view(np.float32))
            keys[kept], ids[kept], weights[kept] = keys[j], ids[j], weight
            total += weight
            kept += 1
    return _cut_of_list(lists, kept, _needed(top_p, total), histogram)


@njit(inline="always")
def _bin(score):
    return np.int64(min(np.float32(-score * _BINS_PER_NAT), _LAST_BIN))


@njit(**EXACT)
def _at_least(exponentials_at, width, bound, ids_at):
    """List the tokens with so large an exponential; how many there are."""
    exponentials, ids = float32_at(exponentials_at), int64_at(ids_at)
    count = np.int64(0)
    for i in range(width):
        ids[count] = i  # overwritten by the next unless it counts: no branch to mispredict
        count += np.int64(exponentials[i] >= bound)
    return count


@njit(**EXACT)
def _keep_bin(ids_at, bins_at, count, at):
    """Reduce the list to the tokens in one bin; how many there are."""
    ids, bins = int64_at(ids_at), int64_at(bins_at)
    kept = np.int64(0)
    for j in range(count):
        ids[kept] = ids[j]
        kept += np.int64(bins[j] == at)
    return kept


@njit(**EXACT)
def _reach(histogram_at, need):
    """The bin in which the sum reaches `need`, and the sum before it."""
    histogram = int64_at(histogram_at)
    at, before = np.int64(0), np.int64(0)
    while before + histogram[at] < need:
        before += histogram[at]
        at += 1
    return at, before


@njit(**EXACT)
def cut_by_mass(x_at, width, scale, top_p, scratch):
    """The cut after the fewest tokens that hold `top_p` of all weight."""
    x, (top, temperature) = float32_at(x_at), scale
    exponentials, (keys, ids, weights), histogram = scratch
    exponentials_at = exponentials.ctypes.data
    total = mass(x_at, width, scale, exponentials_at)
    need = _needed(top_p, total)
    # Tokens under `bound` together weigh less than what the nucleus leaves out.
    left_out = (1.0 - top_p) * np.float64(total) * 2.0**-WEIGHT_BITS
    bound = np.float32(max(0.999 * left_out / width - 1e-12, 0.999 * 2.0**-WEIGHT_BITS))
    ids_at, bins_at, histogram_at = ids.ctypes.data, weights.ctypes.data, histogram.ctypes.data
    count = _at_least(exponentials_at, width, bound, ids_at)
    bins, sums = int64_at(bins_at), int64_at(histogram_at)
    histogram[:] = 0
    for j in range(count):
        i = ids[j]
        bins[j] = _bin(score_of(x[i], top, temperature))
        sums[bins[j]] += whole(exponentials[i])
    at, before = _reach(histogram_at, need)
    count = _keep_bin(ids_at, bins_at, count, at)
    for j in range(count):
        keys[j] = key_of(score_of(x[ids[j]], top, temperature))
        weights[j] = whole(exponentials[ids[j]])
    return _cut_of_list((keys, ids, weights), count, need - before, histogram)
