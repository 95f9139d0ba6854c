"""A model whose weights are int8: a quarter of float32's memory, and of the time to read it.

Each output of a linear layer, and each token's vector of an embedding, is int8 times a scale of its
own.  What is computed with them stays in the model's format: activations keep sixteen bits where
AMX multiplies, and all where it does not, since eight are too few for the few large ones of a row.
Norms, biases, attention, keys and values, and experts that are not linear layers stay as they are.

A layer comes in two shapes.  `Int8Linear` computes like torch, so that transformers' own forward
can be run on the very weights that will be served; on a CPU, `fuse` then packs it for a kernel.  On
a GPU it stays, and the same weights are served: memory is saved there and time is not, since each
step writes them out as bfloat16 first.  torchao's int8 would be other numbers under one name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from pinaivu_node.engine.kernels.integer import WIDTH_MOST

_LARGEST: Final = 127
_AT_ONCE: Final = 2**18
"""Weights in float32, a megabyte: they stay in the processor's own memory until they are done."""


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """A matrix whose rows are int8 times a scale."""

    values: torch.Tensor
    """int8 [rows, width]."""
    scales: torch.Tensor
    """float32 [rows]."""

    def as_float(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix, rounded to a format."""
        return (self.values.float() * self.scales[:, None]).to(dtype)


def quantise_rows(matrix: torch.Tensor) -> Int8Rows:
    """The nearest matrix of int8 rows; ValueError if one holds a number that is none."""
    values = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales = torch.empty(len(matrix), device=matrix.device)
    step = max(1, _AT_ONCE // matrix.shape[1])
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        part = matrix[rows].float()
        least, most = part.aminmax(dim=1)
        scale = torch.maximum(most, -least) / _LARGEST
        scale[scale == 0] = 1.0
        scales[rows] = scale
        values[rows] = (part / scale[:, None]).round_()
    if not bool(scales.isfinite().all()):
        raise ValueError("its weights hold numbers that are none")
    return Int8Rows(values, scales)


class Int8Linear(nn.Module):
    """A linear layer with weights in int8, as torch computes it with what they stand for."""

    def __init__(self, rows: Int8Rows, bias: torch.Tensor | None, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = rows
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype
        self.out_features, self.in_features = rows.values.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in_features] to […, out_features]."""
        if x.dtype is not torch.bfloat16:
            return linear(x, self.rows.as_float(x.dtype), self.bias)
        # Of bfloat16's eight bits the values need no more, but the scales would lose theirs.
        product = linear(x, self.rows.values.bfloat16()).float() * self.rows.scales
        return (product if self.bias is None else product + self.bias).bfloat16()


class Int8Embedding(nn.Module):
    """Vectors of tokens, kept in int8."""

    def __init__(self, rows: Int8Rows, *, factor: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = rows
        self._scales = rows.scales * factor
        # By its parameters transformers knows a model's format and device; fused it has no other.
        self._empty = nn.Parameter(
            torch.empty(0, dtype=dtype, device=rows.values.device), requires_grad=False
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[…] to […, width]."""
        values = embedding(tokens, self.rows.values).float()
        return values.mul_(self._scales[tokens].unsqueeze(-1)).to(self._empty.dtype)


def quantise(model: nn.Module, *, dtype: torch.dtype) -> None:
    """Replace linear layers and embeddings in place; the rest of the model becomes `dtype`.

    The weights are let go one by one, so memory never holds a model and a half.  ValueError names a
    layer that cannot be quantised.
    """
    # A head tied to its embedding is the same matrix; as long as the tensor is here, so is its id.
    done: dict[int, tuple[torch.Tensor, Int8Rows]] = {}

    def rows_of(weight: torch.Tensor, name: str) -> Int8Rows:
        if id(weight) not in done:
            try:
                done[id(weight)] = weight, quantise_rows(weight.detach())
            except ValueError as exc:
                raise ValueError(f"{name} cannot be quantised: {exc}") from exc
        return done[id(weight)][1]

    tied = _tied(model)
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if not _can_be_quantised(child):
                continue
            weight: torch.Tensor = child.weight
            rows = rows_of(weight, f"{path}.{name}")
            if weight is not tied:
                del done[id(weight)]
            setattr(parent, name, _replacement(child, rows, dtype=dtype))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _tied(model: Any) -> torch.Tensor | None:
    """The matrix that is both embedding and head, if it is one."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [getattr(end, "weight", None) for end in ends]
    return weights[0] if weights[0] is weights[1] else None


def _can_be_quantised(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return module.in_features <= WIDTH_MOST
    return _is_embedding(module)


def _is_embedding(module: nn.Module) -> bool:
    """Gemma's multiplies each vector by the same number."""
    scaled = type(module).__name__.endswith("TextScaledWordEmbedding")
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and scaled)


def _replacement(module: nn.Module, rows: Int8Rows, *, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Linear):
        return Int8Linear(rows, module.bias, dtype=dtype)
    return Int8Embedding(rows, factor=float(getattr(module, "embed_scale", 1.0)), dtype=dtype)
