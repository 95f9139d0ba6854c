"""Logits to tokens for a whole batch: every row as if it were alone, by settings of its own.

The definition, which `kernels/draw.py` computes on a CPU and `tensor_draw.py` with torch, alike to
the bit.  Numbers are float32 and every operation is rounded, unless it says otherwise.

1.  Adjust: add the bias; divide the logit, if it is negative multiply it, by the repetition penalty
    if the token is in prompt or answer; subtract the frequency penalty times the token's count in
    the answer, and the presence penalty if that is not 0.  A token that the constraint forbids, or
    whose logit is minus infinity, is impossible.
2.  The score is (logit − largest logit) / temperature: 0 for the likeliest, negative for others.
    Without a temperature the likeliest token is taken, of equals the one with the lowest id.
3.  Cut, in the order of score, then id: after `top_k` tokens; after the fewest of what is left that
    hold `top_p` of its weight; under ln `min_p`.  Weights are exp(score) in whole 2⁻⁴⁰.
4.  Of what is left take the largest score + Gumbel noise in double precision, the noise hashed from
    (seed, position, token id) as in `noise.py`.  That is a sample of the distribution, and a
    function of its inputs.

Logprobs are of the model's own distribution: of the logits as they came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from pinaivu_node.engine.kernels import draw as columns
from pinaivu_node.engine.kernels import score as definition
from pinaivu_node.engine.model.transfer import sent
from pinaivu_node.engine.sampling import noise, tensor_draw
from pinaivu_node.engine.types import SamplingParams

GREEDY_BELOW: Final = 1e-4
"""Temperatures under this would choose the likeliest token anyway."""
MAX_VOCABULARY: Final = 1 << 22
"""So that weights sum up to less than 2⁶³; sixteen times the largest vocabulary there is."""
_NOT_FINITE: Final = "The model's logits are not numbers."
_IMPOSSIBLE: Final = "The model says that no token is possible."
_FORBIDDEN: Final = "The constraint allows no token that is possible here."

_Wholes = list[list[int]]
_Reals = list[list[float]]


class SequenceSampling:
    """How the tokens of one sequence are chosen, and what its penalties need to remember.

    `seed` may be any integer; `answer` are tokens of the answer that are already there.  Token ids
    that the model does not have are ignored wherever they are.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        prompt: Sequence[int],
        answer: Sequence[int],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        if not 0 < vocabulary <= MAX_VOCABULARY:
            raise ValueError(f"a vocabulary of {vocabulary} tokens")
        self.params = params
        self.vocabulary = vocabulary
        self.device = device
        self.seed = seed & noise.MASK
        self.real = _real_columns(params)
        self.min_key = _min_key(params.min_p)
        self.top_k = max(0, min(params.top_k, vocabulary))
        self.reported = -1 if params.logprobs is None else min(params.logprobs, columns.MAX_TOP)
        self._counts_answer = bool(params.presence_penalty or params.frequency_penalty)
        self._repels = params.repetition_penalty != 1.0
        self._place: dict[int, int] = {}
        self._ids = np.empty(0, np.int64)
        self._values = np.zeros((3, 0), np.float32)
        self._fill(prompt, answer)

    def observe(self, token_id: int) -> None:
        """Count a token of the answer, chosen here or delivered before."""
        if (self._counts_answer or self._repels) and 0 <= token_id < self.vocabulary:
            place = self._placed(token_id)
            self._values[1, place] += 1
            self._values[2, place] = self._repels

    @property
    def adjusted(self) -> int:
        """How many tokens have a bias or a penalty."""
        return len(self._place)

    @property
    def adjusted_ids(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Which; the memory has room for more behind."""
        return self._ids

    @property
    def adjusted_values(self) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """Rows: bias, count in the answer, whether the repetition penalty applies."""
        return self._values

    def _fill(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        known = range(self.vocabulary)
        bias = {i: value for i, value in self.params.logit_bias.items() if i in known and value}
        met: Iterable[int] = {*prompt, *answer} if self._repels else ()
        ids = sorted({*bias, *(i for i in met if i in known)})
        room = len(ids) + 64
        self._place = {token_id: place for place, token_id in enumerate(ids)}
        self._ids, self._values = np.zeros(room, np.int64), np.zeros((3, room), np.float32)
        self._ids[: len(ids)] = ids
        for token_id, value in bias.items():
            self._values[0, self._place[token_id]] = value
        for token_id in met:
            if token_id in self._place:
                self._values[2, self._place[token_id]] = 1
        for token_id in answer:
            self.observe(token_id)

    def _placed(self, token_id: int) -> int:
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._values = np.concatenate([self._values, np.zeros_like(self._values)], axis=1)
        self._ids[place] = token_id
        return place


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to be chosen, for the position counted from the start of the prompt.

    Bit i mod 32 of word i // 32 of `allowed` (int32, on the CPU) is set if token i may be chosen;
    tokens that it has no bit for may not.
    """

    state: SequenceSampling
    position: int
    allowed: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """The token, and if logprobs were asked for its own and the likeliest tokens' in its place.

    `top` are (token id, logprob), most likely first, without impossible tokens.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Broken:
    """Nothing can be chosen in this row; others in the batch are not touched by that."""

    reason: str


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Chosen | Broken]:
    """The next token of each row of logits, [len(draws), vocabulary] in float32; they stay as are.

    ValueError if logits and draws do not fit each other, which is the caller's mistake.
    """
    _check(logits, draws)
    if not draws:
        return []
    if logits.device.type == "cpu":
        wholes, reals = _by_kernel(logits, draws)
    else:
        wholes, reals = _by_tensors(logits, draws)
    return [
        _outcome(draw, whole, real) for draw, whole, real in zip(draws, wholes, reals, strict=True)
    ]


def _check(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    if logits.dtype != torch.float32 or logits.ndim != 2 or len(logits) != len(draws):
        raise ValueError(f"{len(draws)} draws from {logits.dtype} logits {tuple(logits.shape)}")
    for draw in draws:
        if draw.state.vocabulary != logits.shape[1]:
            raise ValueError(f"{draw.state.vocabulary} tokens, {logits.shape[1]} logits")
        if draw.allowed is not None and draw.allowed.dtype != torch.int32:
            raise ValueError(f"a mask in {draw.allowed.dtype}")


def _by_kernel(logits: torch.Tensor, draws: Sequence[Draw]) -> tuple[_Wholes, _Reals]:
    logits = logits.contiguous()
    whole, real = _columns(draws)
    masks: list[torch.Tensor] = []  # kept until the kernel has read them
    for row, draw in enumerate(draws):
        state = draw.state
        if state.adjusted:
            whole[row, columns.ADJUSTED] = state.adjusted
            whole[row, columns.IDS_AT] = state.adjusted_ids.ctypes.data
            whole[row, columns.VALUES_AT] = state.adjusted_values.ctypes.data
            whole[row, columns.VALUES_STRIDE] = state.adjusted_values.shape[1]
        if draw.allowed is not None:
            masks.append(draw.allowed.cpu().contiguous())
            whole[row, columns.MASK_AT] = masks[-1].data_ptr()
            whole[row, columns.MASK_WORDS] = masks[-1].numel()
    out_whole = np.zeros((len(draws), columns.OUT_WHOLE_COLUMNS), np.int64)
    out_real = np.zeros((len(draws), columns.OUT_REAL_COLUMNS), np.float64)
    columns.draw(logits.data_ptr(), logits.shape[1], whole, real, out_whole, out_real)
    return out_whole.tolist(), out_real.tolist()


def _by_tensors(logits: torch.Tensor, draws: Sequence[Draw]) -> tuple[_Wholes, _Reals]:
    whole, real = _columns(draws)
    adjustments, masks = _adjustments(logits, draws), _masks(logits, draws)
    return tensor_draw.draw(logits, whole, real, adjustments, masks)


def _columns(
    draws: Sequence[Draw],
) -> tuple[
    np.ndarray[tuple[int, int], np.dtype[np.int64]],
    np.ndarray[tuple[int, int], np.dtype[np.float64]],
]:
    whole = np.zeros((len(draws), columns.WHOLE_COLUMNS), np.int64)
    whole[:, : columns.REPORTED + 1] = [
        (
            tensor_draw.signed(noise.stream(draw.state.seed, draw.position)),
            draw.state.top_k,
            draw.state.min_key,
            draw.state.reported,
        )
        for draw in draws
    ]
    return whole, np.array([draw.state.real for draw in draws], np.float64)


def _adjustments(logits: torch.Tensor, draws: Sequence[Draw]) -> tensor_draw.Adjustments | None:
    touched = [(row, draw.state) for row, draw in enumerate(draws) if draw.state.adjusted]
    if not touched:
        return None
    rows = np.repeat([row for row, _ in touched], [state.adjusted for _, state in touched])
    ids = np.concatenate([state.adjusted_ids[: state.adjusted] for _, state in touched])
    values = [state.adjusted_values[:, : state.adjusted] for _, state in touched]
    return tensor_draw.Adjustments(
        sent(torch.from_numpy(rows), logits.device),
        sent(torch.from_numpy(ids + rows * logits.shape[1]), logits.device),
        sent(torch.from_numpy(np.concatenate(values, axis=1)), logits.device),
    )


def _masks(logits: torch.Tensor, draws: Sequence[Draw]) -> tensor_draw.Masks | None:
    masked = [(row, draw.allowed) for row, draw in enumerate(draws) if draw.allowed is not None]
    if not masked:
        return None
    words = torch.zeros(len(masked), (logits.shape[1] + 31) // 32, dtype=torch.int32)
    for to, (_, allowed) in zip(words, masked, strict=True):
        given = allowed.flatten()[: len(to)]
        to[: len(given)] = given
    rows = torch.tensor([row for row, _ in masked])
    return tensor_draw.Masks(sent(rows, logits.device), sent(words, logits.device))


def _real_columns(params: SamplingParams) -> tuple[float, ...]:
    """In the order of the columns of the kernel's table."""
    # Not a number is greedy, too.
    temperature = params.temperature if params.temperature >= GREEDY_BELOW else 0.0
    return (
        temperature,
        params.top_p,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
    )


def _min_key(min_p: float) -> int:
    """The key of the least score that is left by a share of the likeliest's probability."""
    if not min_p > 0.0:
        return definition.INFINITE_KEY - 1
    return int(np.float32(-math.log(min(min_p, 1.0))).view(np.int32)) & int(definition.MAGNITUDE)


def _outcome(draw: Draw, whole: list[int], real: list[float]) -> Chosen | Broken:
    if whole[columns.STATUS] == columns.NOT_FINITE:
        return Broken(_NOT_FINITE)
    if whole[columns.STATUS] == columns.NONE_ALLOWED:
        return Broken(_IMPOSSIBLE if draw.allowed is None else _FORBIDDEN)
    token_id = whole[columns.TOKEN]
    if draw.state.reported < 0:
        return Chosen(token_id)
    highest = real[columns.HIGHEST]
    rest = math.log(whole[columns.TOTAL] * 2.0**-definition.WEIGHT_BITS)
    listed = min(draw.state.reported, whole[columns.LISTED])
    ids = whole[columns.LIST : columns.LIST + listed]
    values = real[columns.OUT_REAL_LIST : columns.OUT_REAL_LIST + listed]
    return Chosen(
        token_id,
        real[columns.CHOSEN] - highest - rest,
        tuple((i, value - highest - rest) for i, value in zip(ids, values, strict=True)),
    )
