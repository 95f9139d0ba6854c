"""Texts to vectors, with an encoder as sentence-transformers lays them out in a folder.

Inputs of a batch are packed in one row, [1, tokens], and each attends to itself alone: there is no
padding to compute, nor to get wrong.  Every other operation works on a token at a time, and in
float32 the linear layers add in an order that does not depend on the number of rows (see
`fused.py`), so on a CPU the vector of an input has the same bits whatever it is batched with.

An architecture whose attention cannot be told of the packing is run one input at a time, with the
same promise.  Which it is, a probe at load finds out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, assert_never

import torch
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import AttentionInterface, AutoModel

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.model.linear import PackedLinear
from pinaivu_node.engine.model.pretrained import (
    Progress,
    check_config,
    device_of,
    dtype_of,
    read_model,
    read_tokenizer,
    use_threads,
)
from pinaivu_node.engine.model.weights import LoadError, check_folder, read_json
from pinaivu_node.engine.types import EmbeddingRequest, Embeddings, PromptRefused

logger = logging.getLogger(__name__)

Input = str | tuple[int, ...]
Vector = tuple[float, ...]

MAX_INPUTS: Final = 2048
"""As in the OpenAI API."""
MAX_TOKENS: Final = 300_000
"""Of all inputs of a request together, as in the OpenAI API."""
_MAX_CHARACTERS_PER_TOKEN: Final = 128
"""No language comes near; a text of more is blanks, or words that no tokenizer knows."""
NO_VECTOR: Final = "The model makes no vector of this: its numbers overflow."
_NAME: Final = "pinaivu-packed"
_NO_HEAD: Final = ("pooler.", "embeddings.position_ids")
"""Weights that embeddings are not made of; some folders lack them."""
_TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Distance of a probe's unit vector from the one that the model makes by itself."""
_PROBE: Final = (7, 1, 12, 3)
"""Tokens of the probe's inputs."""


class Pooling(Enum):
    """How an input's vector is made of its tokens'."""

    MEAN = "mean"
    FIRST = "cls"
    LAST = "lasttoken"
    MAX = "max"


class EncoderModel:
    """An encoder, ready to embed.  Not for two threads at once, but for `tokenised`."""

    def __init__(
        self, model: Any, tokenizer: Any, *, pooling: Pooling, window: int, batch_tokens: int
    ) -> None:
        """`load` makes one from a folder."""
        self.context_window: Final = window
        self.width: Final = int(model.config.get_text_config().hidden_size)
        self._model = model
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._batch_tokens = batch_tokens
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._first_position = _first_position(model)
        self._packs = self._can_pack()

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        progress: Progress = lambda _share, _what: None,
    ) -> EncoderModel:
        """The encoder in this folder, on the device; LoadError if it cannot be run."""
        check_folder(config.model)
        check_config(config.model)
        if config.quantization is not None:
            raise LoadError(f"{config.model.name} makes vectors, which are not made in int8 here")
        pooling = pooling_of(config.model)
        device = device_of(config.device)
        use_threads(config, device)
        progress(0.0, "reading the tokenizer")
        tokenizer = read_tokenizer(config.model)
        progress(0.2, "reading weights")
        dtype = dtype_of(config.dtype, device)
        model = read_model(AutoModel, config.model, dtype=dtype, may_lack=_NO_HEAD).to(device)
        progress(0.7, "preparing layers")
        if device.type == "cpu" and dtype in {torch.float32, torch.bfloat16}:
            _pack_linears(model)
        window = min(_window(config.model, model, tokenizer), config.context_window or 2**31)
        return cls(
            model,
            tokenizer,
            pooling=pooling,
            window=window,
            batch_tokens=config.prefill_chunk,
        )

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device: torch.device = self._model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; vectors come in float32 in any case."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    def embed(self, request: EmbeddingRequest) -> Embeddings:
        """All vectors, in as many batches as it takes; PromptRefused if an input cannot be run."""
        inputs = self.tokenised(request)
        vectors: list[Vector] = [()] * len(inputs)
        for batch in self.batches(inputs):
            made = self.vectors([inputs[number] for number in batch])
            for number, vector in zip(batch, made, strict=True):
                if vector is None:
                    raise PromptRefused(NO_VECTOR)
                vectors[number] = vector
        return Embeddings(tuple(vectors), sum(map(len, inputs)))

    def tokenised(self, request: EmbeddingRequest) -> list[list[int]]:
        """The inputs as token ids; PromptRefused, saying which and why, if one cannot be run.

        A text gets the special tokens of the model's own training; token ids are taken as they are.
        """
        if not 1 <= len(request.inputs) <= MAX_INPUTS:
            raise PromptRefused(f"1 to {MAX_INPUTS} texts can be embedded at once.")
        inputs = []
        tokens = 0
        for number, given in enumerate(request.inputs):
            inputs.append(self._ids(given, number))
            tokens += len(inputs[-1])
            if tokens > MAX_TOKENS:
                raise PromptRefused(f"The inputs have more than {MAX_TOKENS} tokens together.")
        return inputs

    def batches(self, inputs: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The numbers of the inputs, longest first, in batches of `prefill_chunk` tokens at most.

        One input alone may have more: it cannot be split.
        """
        batch: list[int] = []
        room = self._batch_tokens
        for number in sorted(range(len(inputs)), key=lambda number: -len(inputs[number])):
            size = len(inputs[number])
            if batch and size > room:
                yield batch
                batch, room = [], self._batch_tokens
            batch.append(number)
            room -= size
        if batch:
            yield batch

    @torch.inference_mode()
    def vectors(self, inputs: Sequence[Sequence[int]]) -> list[Vector | None]:
        """A vector of unit length for each of these token ids, computed in one go.

        None where the model's numbers overflow, and there is no direction to speak of.
        """
        states = self._packed(inputs) if self._packs else map(self._alone, inputs)
        pooled = torch.stack([self._pooled(each) for each in states])
        sound = (pooled.isfinite().all(-1) & (pooled != 0).any(-1)).tolist()
        rows = normalize(pooled, dim=-1).tolist()
        return [tuple(row) if is_sound else None for row, is_sound in zip(rows, sound, strict=True)]

    # --- inputs -----------------------------------------------------------------------------------

    def _ids(self, given: Input, number: int) -> list[int]:
        if isinstance(given, str):
            if len(given) > self.context_window * _MAX_CHARACTERS_PER_TOKEN:
                raise PromptRefused(
                    f"Input {number} has {len(given)} characters: more than this model's context "
                    f"of {self.context_window} tokens can hold."
                )
            # Folders of sentence-transformers come with a tokenizer that cuts and pads.
            ids = self._tokenizer(given, truncation=False, padding=False, verbose=False)
            given = ids["input_ids"]
        ids = list(given)
        if not ids:
            raise PromptRefused(f"Input {number} is empty.")
        if len(ids) > self.context_window:
            raise PromptRefused(
                f"This model's maximum context length is {self.context_window} tokens. "
                f"However, input {number} has {len(ids)} tokens."
            )
        wrong = next((each for each in ids if not 0 <= each < self._vocabulary), None)
        if wrong is not None:
            raise PromptRefused(f"There is no token {wrong} (input {number}).")
        return ids

    # --- computation ------------------------------------------------------------------------------

    def _packed(self, inputs: Sequence[Sequence[int]]) -> Sequence[torch.Tensor]:
        ends = list(accumulate(map(len, inputs)))
        starts = [0, *ends[:-1]]
        first = self._first_position
        places = [range(first, first + len(each)) for each in inputs]
        states: torch.Tensor = self._model(
            input_ids=self._row(inputs),
            position_ids=self._row(places),
            segments=tuple(zip(starts, ends, strict=True)),
        ).last_hidden_state
        return [states[0, start:end] for start, end in zip(starts, ends, strict=True)]

    def _alone(self, ids: Sequence[int]) -> torch.Tensor:
        states: torch.Tensor = self._model(input_ids=self._row([ids])).last_hidden_state
        return states[0]

    def _row(self, parts: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([[each for part in parts for each in part]], device=self.device)

    def _pooled(self, states: torch.Tensor) -> torch.Tensor:
        match self._pooling:
            case Pooling.MEAN:
                return states.float().mean(0)
            case Pooling.FIRST:
                return states[0].float()
            case Pooling.LAST:
                return states[-1].float()
            case Pooling.MAX:
                return states.float().amax(0)
            case _:
                assert_never(self._pooling)

    @torch.inference_mode()
    def _can_pack(self) -> bool:
        """Whether a packed batch gives what the inputs give alone; sets the attention for it."""
        lengths = [min(length, self.context_window) for length in _PROBE]
        ids = [(7919 * (place + 1)) % self._vocabulary for place in range(sum(lengths))]
        ends = list(accumulate(lengths))
        inputs = [ids[end - size : end] for end, size in zip(ends, lengths, strict=True)]
        expected = [self._pooled(self._alone(each)) for each in inputs]
        before = self._model.config._attn_implementation  # noqa: SLF001 - it has no other name
        AttentionInterface.register(_NAME, _attend)
        try:
            self._model.set_attn_implementation(_NAME)
            made = [self._pooled(each) for each in self._packed(inputs)]
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as exc:
            logger.info("inputs are embedded one by one: %s", exc)
        else:
            pairs = zip(made, expected, strict=True)
            error = max(float((unit(a) - unit(b)).norm()) for a, b in pairs)
            if error <= _TOLERANCE[self.dtype]:
                return True
            logger.info("inputs are embedded one by one: packed ones are off by %.1e", error)
        self._model.set_attn_implementation(before)
        return False


def unit(vector: torch.Tensor) -> torch.Tensor:
    """The vector of this direction and of length 1."""
    return normalize(vector, dim=-1)


def _attend(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[tuple[int, int]],
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **unknown: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface; tokens attend within their segment."""
    known = {"dropout", "position_ids", "output_attentions", "use_cache", "return_dict"}
    surprises = [name for name, given in unknown.items() if given is not None and name not in known]
    if attention_mask is not None or sliding_window or surprises:
        raise NotImplementedError(f"attention with a mask, a window or {surprises}")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    attended = [
        scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            scale=scaling,
            is_causal=causal,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in segments
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def _pack_linears(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear([child]))


# --- what the folder says -----------------------------------------------------------------------


def pooling_of(folder: Path) -> Pooling:
    """How this folder's vectors are made; LoadError if in a way that is not known here.

    A folder that does not say gets the mean, as with sentence-transformers.
    """
    for module in _modules(folder):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in {"Transformer", "Pooling", "Normalize"}:
            raise LoadError(
                f"{folder / 'modules.json'} puts a layer {kind!r} after the model, which this "
                "engine does not have: serve it with another server and --engine openai"
            )
        if kind == "Pooling":
            return _pooling(folder / str(module.get("path", "")) / "config.json")
    path = folder / "1_Pooling" / "config.json"
    return _pooling(path) if path.is_file() else Pooling.MEAN


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    if not path.is_file():
        return []
    modules = read_json(path, kind=list)
    if not all(isinstance(each, dict) for each in modules):
        raise LoadError(f"{path} is damaged (no list of modules): pull the model again")
    return list(modules)


def _pooling(path: Path) -> Pooling:
    said = read_json(path)
    modes = {
        "pooling_mode_mean_tokens": Pooling.MEAN,
        "pooling_mode_cls_token": Pooling.FIRST,
        "pooling_mode_lasttoken": Pooling.LAST,
        "pooling_mode_max_tokens": Pooling.MAX,
    }
    chosen = [name for name, value in said.items() if name.startswith("pooling_mode_") and value]
    if "pooling_mode" in said:  # how newer folders say it
        chosen = [f"pooling_mode_{said['pooling_mode']}"]
        modes |= {f"pooling_mode_{mode.value}": mode for mode in Pooling}
    if len(chosen) != 1 or chosen[0] not in modes:
        raise LoadError(
            f"{path} asks for {' and '.join(chosen) or 'no pooling'}; known are "
            f"{', '.join(mode.value for mode in Pooling)}"
        )
    return modes[chosen[0]]


def _first_position(model: Any) -> int:
    """The position of an input's first token: RoBERTa's come after that of the padding."""
    table = _positions(model)
    padding = None if table is None else table.padding_idx
    return 0 if padding is None else padding + 1


def _positions(model: Any) -> nn.Embedding | None:
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    return table if isinstance(table, nn.Embedding) else None


def _window(folder: Path, model: Any, tokenizer: Any) -> int:
    """Tokens of an input at most: the least that model, tokenizer and the folder's makers say."""
    known = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    if (table := _positions(model)) is not None:
        known.append(table.num_embeddings - _first_position(model))
    path = folder / "sentence_bert_config.json"
    if path.is_file():
        known.append(read_json(path).get("max_seq_length"))
    known.append(tokenizer.model_max_length)
    sound = [number for number in known if isinstance(number, int) and 0 < number < 2**24]
    if not sound:
        raise LoadError(f"{folder} does not say how long an input may be: use --context-window")
    return math.floor(min(sound))
