"""Logits to one token id.  The draw is Gumbel noise hashed from (seed, position, token id).

The largest of log-probability plus Gumbel noise is a sample of the distribution; with hashed noise
it is a function of its inputs.  Order, as in the engines that clients know: logit bias, penalties,
temperature, then top_k, top_p and min_p, each on what is left of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from pinaivu_node.engine import noise
from pinaivu_node.engine.types import SamplingParams

GREEDY_BELOW: Final = 1e-4
"""Temperatures under this would overflow the logits, and choose the likeliest token anyway."""
_SHORTLIST: Final = 1024
"""The nucleus nearly always lies in so few tokens; sorting a vocabulary of 262,144 takes 20 ms."""


def _signed(x: int) -> int:
    """The same 64 bits as torch's int64 holds them."""
    return x - 2**64 if x >= 2**63 else x


_GOLDEN: Final = _signed(noise.GOLDEN)
_MIX_1: Final = _signed(noise.MIX_1)
_MIX_2: Final = _signed(noise.MIX_2)


def uniform_noise(stream: int, token_ids: torch.Tensor) -> torch.Tensor:
    """`noise.uniform` for many token ids (int64), to the bit; float64."""
    x = (token_ids + 1) * _GOLDEN + _signed(stream)
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    x = x ^ _shifted(x, 31)
    return (_shifted(x, 11).double() + 0.5) * 2.0**-53


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Sampler:
    """Chooses the tokens of one sequence; remembers what its penalties need."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt: Sequence[int],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self._params = params
        self._device = device
        self._bias = _bias(params, vocabulary=vocabulary, device=device)
        self._counts: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocabulary, device=device)
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._seen[torch.tensor(list(prompt), device=device)] = True

    def observe(self, token_id: int) -> None:
        """Count a token of the answer, chosen here or delivered before."""
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._seen is not None:
            self._seen[token_id] = True

    def choose(self, logits: torch.Tensor, *, position: int) -> int:
        """The token for this position, from one row of logits."""
        row = self._penalised(logits.float())
        if self._params.temperature < GREEDY_BELOW:
            return int(row.argmax())
        token_ids, scores = self._candidates(row / self._params.temperature)
        stream = noise.stream(self._params.seed, position)
        gumbel = -torch.log(-torch.log(uniform_noise(stream, token_ids)))
        return int(token_ids[(scores.double() + gumbel).argmax()])

    def _penalised(self, row: torch.Tensor) -> torch.Tensor:
        if self._bias is not None:
            row = row + self._bias
        if self._seen is not None:
            penalty = self._params.repetition_penalty
            row = torch.where(self._seen, torch.where(row > 0, row / penalty, row * penalty), row)
        if self._counts is not None:
            row = row - self._params.frequency_penalty * self._counts
            row = row - self._params.presence_penalty * (self._counts > 0)
        return row

    def _candidates(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids that may be drawn, and their scores."""
        params = self._params
        top_k = params.top_k if params.top_k > 0 else row.numel()
        if top_k >= row.numel() and params.top_p >= 1.0 and params.min_p <= 0.0:
            return torch.arange(row.numel(), device=self._device), row
        scores, token_ids = _likeliest(row, top_k=top_k, top_p=params.top_p)
        if params.min_p > 0.0:
            # The likeliest token comes first; min_p is relative to it.
            keep = max(1, int((scores >= scores[0] + math.log(params.min_p)).sum()))
            scores, token_ids = scores[:keep], token_ids[:keep]
        return token_ids, scores


def _likeliest(row: torch.Tensor, *, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k likeliest tokens, of these the fewest that hold top_p of their probability."""
    wanted = min(top_k, row.numel())
    everything = row if wanted == row.numel() else row.topk(wanted).values
    total = everything.logsumexp(-1)
    for size in (min(_SHORTLIST, wanted), wanted):
        scores, token_ids = row.topk(size)
        if top_p >= 1.0:
            if size == wanted:
                break
            continue
        mass = (scores - total).exp().cumsum(-1)
        if size == wanted or float(mass[-1]) >= top_p:
            # A token stays while those before it do not yet hold top_p; the first always stays.
            keep = 1 + int((mass[:-1] < top_p).sum())
            return scores[:keep], token_ids[:keep]
    return scores, token_ids


def _bias(params: SamplingParams, *, vocabulary: int, device: torch.device) -> torch.Tensor | None:
    """One number per token; ids that the model does not have are the client's mistake, ignored."""
    known = {i: value for i, value in params.logit_bias.items() if 0 <= i < vocabulary}
    if not known:
        return None
    bias = torch.zeros(vocabulary, device=device)
    bias[torch.tensor(list(known), device=device)] = torch.tensor(
        list(known.values()), dtype=bias.dtype, device=device
    )
    return bias
