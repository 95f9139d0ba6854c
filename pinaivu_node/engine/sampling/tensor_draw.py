"""One token per row of logits by torch operations, on any device: the definition of `sampler.py`.

Bit for bit what `kernels/draw.py` computes, and for every row what it would be alone.  Each step is
one rounded operation per element; what is summed are whole numbers, so that no reduction's order
matters, on a GPU either.  Nothing is sorted: cuts are found by histogram, a third of the bits of a
key at a time.  One transfer to the device, one back.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import torch

from pinaivu_node.engine.kernels import draw as columns
from pinaivu_node.engine.kernels import score as definition
from pinaivu_node.engine.model.transfer import sent
from pinaivu_node.engine.sampling import noise

_MAGNITUDE: Final = int(definition.MAGNITUDE)
_POLYNOMIAL: Final = [
    float(each)
    for each in (
        definition.C1,
        definition.C2,
        definition.C3,
        definition.C4,
        definition.C5,
        definition.C6,
    )
]
_LEVELS: Final = ((20, 11), (10, 10), (0, 10))
"""Shift and width of the digits of a key of 31 bits."""


class Adjustments(NamedTuple):
    """Tokens with a bias or a penalty, of all rows: indices into the flat logits, and why."""

    rows: torch.Tensor
    at: torch.Tensor
    values: torch.Tensor
    """Rows: bias, count in the answer, and whether the repetition penalty applies."""


class Masks(NamedTuple):
    """Rows whose tokens are constrained, and the bits of those that may be chosen."""

    rows: torch.Tensor
    words: torch.Tensor


def signed(x: int) -> int:
    """The same 64 bits as torch's int64 holds them."""
    return x - 2**64 if x >= 2**63 else x


_GOLDEN: Final = signed(noise.GOLDEN)
_MIX_1: Final = signed(noise.MIX_1)
_MIX_2: Final = signed(noise.MIX_2)


def uniform_noise(streams: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """`noise.uniform` for many streams and token ids (int64), to the bit; float64."""
    x = (token_ids + 1) * _GOLDEN + streams
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    x = x ^ _shifted(x, 31)
    return (_shifted(x, 11).double() + 0.5) * 2.0**-53


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def exponential(score: torch.Tensor) -> torch.Tensor:
    """`score.exponential`, to the bit; float32."""
    x = score.clamp(min=float(definition.LOWEST))
    n = torch.floor(x * float(definition.LOG2_E) + 0.5)
    r = x - n * float(definition.LN2_HIGH)
    r = r - n * float(definition.LN2_LOW)
    p = r * _POLYNOMIAL[0] + _POLYNOMIAL[1]
    for coefficient in _POLYNOMIAL[2:]:
        p = p * r + coefficient
    p = p * (r * r) + r + 1.0
    return p * ((n.int() + 127) << 23).view(torch.float32)


def weight(score: torch.Tensor) -> torch.Tensor:
    """`score.weight_of`: exp of a score in whole 2⁻⁴⁰, rounded down; int64."""
    return (exponential(score).double() * 2.0**definition.WEIGHT_BITS).long()


def draw(
    logits: torch.Tensor,
    whole: np.ndarray[tuple[int, int], np.dtype[np.int64]],
    real: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    adjustments: Adjustments | None,
    masks: Masks | None,
) -> tuple[list[list[int]], list[list[float]]]:
    """As `kernels.draw.draw`, but for the addresses in `whole`."""
    device = logits.device
    whole_there = sent(torch.from_numpy(whole), device)
    reals = sent(torch.from_numpy(real), device)
    good = _is_good(logits)
    row = logits
    if adjustments is not None:
        row = _adjusted(row, adjustments, reals.float())
    if masks is not None:
        row = _masked(row, masks)
    good &= _is_good(row)
    top = row.amax(1, keepdim=True)
    status = torch.where(top[:, 0] == -math.inf, columns.NONE_ALLOWED, columns.FINE)
    status = torch.where(good, status, columns.NOT_FINITE)
    token = _first(row == top)
    if (real[:, columns.TEMPERATURE] > 0).any():
        token = torch.where(
            reals[:, columns.TEMPERATURE] > 0,
            _drawn(row, top, whole_there, reals, whole=whole, real=real),
            token,
        )
    out_whole = whole_there.new_zeros(len(whole), columns.OUT_WHOLE_COLUMNS)
    out_real = reals.new_zeros(len(whole), columns.OUT_REAL_COLUMNS)
    out_whole[:, columns.STATUS], out_whole[:, columns.TOKEN] = status, token
    wanted = int(whole[:, columns.REPORTED].max())
    if wanted >= 0:
        _report(logits, token, min(wanted, logits.shape[1]), out_whole, out_real)
    # The bits of the real numbers travel as integers: one transfer.
    flat = torch.cat([out_whole, out_real.view(torch.int64)], 1).cpu().numpy()
    wholes, bits = np.split(flat, [columns.OUT_WHOLE_COLUMNS], axis=1)
    return wholes.tolist(), bits.copy().view(np.float64).tolist()


def _is_good(row: torch.Tensor) -> torch.Tensor:
    """Minus infinity is a number here: of a token that is impossible."""
    return (row < math.inf).all(1)


def _first(marks: torch.Tensor) -> torch.Tensor:
    """The lowest marked index of each row; the width if there is none."""
    width = marks.shape[1]
    ids = torch.arange(width, device=marks.device)
    return torch.where(marks, ids, width).amin(1)


def _adjusted(row: torch.Tensor, changes: Adjustments, real: torch.Tensor) -> torch.Tensor:
    row = row.clone()
    bias, count, seen = changes.values
    repetition, frequency, presence = (
        real[changes.rows, column]
        for column in (columns.REPETITION, columns.FREQUENCY, columns.PRESENCE)
    )
    flat = row.view(-1)
    x = flat[changes.at] + bias
    x = torch.where(seen > 0, torch.where(x > 0, x / repetition, x * repetition), x)
    x = x - frequency * count
    flat[changes.at] = torch.where(count > 0, x - presence, x)
    return row


def _masked(row: torch.Tensor, masks: Masks) -> torch.Tensor:
    bits = torch.arange(32, device=row.device, dtype=torch.int32)
    allowed = ((masks.words.unsqueeze(-1) >> bits) & 1).flatten(1).bool()[:, : row.shape[1]]
    missing = row.shape[1] - allowed.shape[1]
    allowed = torch.nn.functional.pad(allowed, (0, missing))
    return row.index_copy(0, masks.rows, row[masks.rows].masked_fill(~allowed, -math.inf))


def _drawn(
    row: torch.Tensor,
    top: torch.Tensor,
    there: torch.Tensor,
    reals: torch.Tensor,
    *,
    whole: np.ndarray[tuple[int, int], np.dtype[np.int64]],
    real: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> torch.Tensor:
    temperature = reals[:, columns.TEMPERATURE : columns.TEMPERATURE + 1]
    # A greedy row is not read; by 1 it divides without harm.
    temperature = torch.where(temperature > 0, temperature, 1.0).float()
    score = (row - top) / temperature
    keys = score.view(torch.int32) & _MAGNITUDE
    candidates = (keys < definition.INFINITE_KEY) & (
        keys <= there[:, columns.MIN_KEY : columns.MIN_KEY + 1]
    )
    sampled = real[:, columns.TEMPERATURE] > 0
    ranked = sampled & (whole[:, columns.TOP_K] > 0) & (whole[:, columns.TOP_K] < row.shape[1])
    nucleus = sampled & (real[:, columns.TOP_P] < 1)
    if (cut := np.flatnonzero(ranked | nucleus)).size:
        rows = sent(torch.from_numpy(cut), row.device)
        limits = _Limits(
            torch.from_numpy(np.where(ranked, whole[:, columns.TOP_K], row.shape[1])[cut]),
            torch.from_numpy(np.where(nucleus, real[:, columns.TOP_P], math.inf)[cut]),
        )
        kept = _kept(score[rows], keys[rows].long(), limits)
        candidates[rows] &= kept
    ids = torch.arange(row.shape[1], device=row.device)
    u = uniform_noise(there[:, columns.STREAM : columns.STREAM + 1], ids)
    final = score.double() - torch.log(-torch.log(u))
    final = final.masked_fill(~candidates, -math.inf)
    return _first(final == final.amax(1, keepdim=True))


class _Limits(NamedTuple):
    """Of each row: how many tokens, and how much of their weight; infinite is no limit."""

    top_k: torch.Tensor
    top_p: torch.Tensor


def _kept(score: torch.Tensor, keys: torch.Tensor, limits: _Limits) -> torch.Tensor:
    """The tokens within the limits."""
    finite = keys < definition.INFINITE_KEY
    top_k = sent(limits.top_k, keys.device).unsqueeze(1)
    top_p = sent(limits.top_p, keys.device).unsqueeze(1)
    kept = _within(keys, finite.long(), torch.minimum(top_k, finite.sum(1, keepdim=True)))
    weights = torch.where(kept, weight(score), 0)
    total = weights.sum(1, keepdim=True)
    need = (top_p.clamp(max=1.0) * total.double()).ceil().long()
    need = torch.minimum(need.clamp(min=1), total)
    return torch.where(top_p < math.inf, kept & _within(keys, weights, need), kept)


def _within(keys: torch.Tensor, weights: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    """The first tokens, by key and then id, whose weights reach what is needed."""
    prefix, before = torch.zeros_like(need), torch.zeros_like(need)
    for shift, bits in _LEVELS:
        live = (keys >> (shift + bits)) == prefix
        histogram = weights.new_zeros(len(keys), 1 << bits)
        histogram.scatter_add_(
            1, (keys >> shift) & ((1 << bits) - 1), torch.where(live, weights, 0)
        )
        reached = histogram.cumsum(1) + before
        at = (reached < need).sum(1, keepdim=True).clamp(max=(1 << bits) - 1)
        before = torch.where(at > 0, reached.gather(1, (at - 1).clamp(min=0)), before)
        prefix = (prefix << bits) | at
    ties = (keys == prefix) & (weights > 0)
    each = torch.where(ties, weights, 0).amax(1, keepdim=True).clamp(min=1)
    rank = ties.cumsum(1)
    return (keys < prefix) | (ties & (rank * each < need - before + each))


def _report(
    logits: torch.Tensor,
    token: torch.Tensor,
    wanted: int,
    out_whole: torch.Tensor,
    out_real: torch.Tensor,
) -> None:
    """What logprobs are made of, for every row: it is little beside the transfer."""
    highest = logits.amax(1, keepdim=True)
    out_whole[:, columns.TOTAL] = weight(logits - highest).sum(1)
    out_real[:, columns.HIGHEST] = highest[:, 0].double()
    inside = token.clamp(max=logits.shape[1] - 1).unsqueeze(1)
    out_real[:, columns.CHOSEN] = logits.gather(1, inside)[:, 0].double()
    if wanted == 0:
        return
    bits = (logits + 0.0).view(torch.int32)
    rank = (bits ^ ((bits >> 31) & _MAGNITUDE)).long()
    ids = torch.arange(logits.shape[1], device=logits.device)
    # One number in the order of both: the logit, then the lower id.
    best = ((rank << 32) | (_MAGNITUDE - ids)).topk(wanted).values
    listed = _MAGNITUDE - (best & _MAGNITUDE)
    values = logits.gather(1, listed)
    out_whole[:, columns.LISTED] = (values > -math.inf).sum(1)
    out_whole[:, columns.LIST : columns.LIST + wanted] = listed
    out_real[:, columns.OUT_REAL_LIST : columns.OUT_REAL_LIST + wanted] = values.double()
