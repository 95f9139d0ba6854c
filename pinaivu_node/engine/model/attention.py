"""Attention over the paged KV cache, as transformers' model classes call it.

A batch is one packed row of tokens, [1, tokens]: the next token of some sequences, chunks of the
prompts of others.  `Batch` travels through the model's forward as a keyword argument and tells each
layer's attention whose tokens are where; transformers builds no mask for an attention function that
it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from transformers import AttentionInterface

NAME: Final = "pinaivu"


class KvCache(Protocol):
    """Keys and values of all sequences, and attention over them; one per device kind."""

    page: int
    """Positions per page."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        batch: Batch,
        look: Look,
    ) -> torch.Tensor:
        """Store the batch's keys and values, then attend; [tokens, heads · head_dim].

        query, key, value    [tokens, heads, head_dim], rotated; the last two dimensions dense
        """
        ...


@dataclass(frozen=True, slots=True)
class Look:
    """What a layer's queries see, and how."""

    scale: float
    window: int = 0
    """How far back, the token itself included; 0: everything."""
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one step: which sequence they are of, and where its cache is."""

    cache: KvCache
    chunks: torch.Tensor
    """int64 [chunks, 4], on the CPU: first token of it, tokens, start position, table row."""
    tables: torch.Tensor
    """int64 [sequences, pages], on the CPU: each sequence's pages, in order of position."""


def attend(  # noqa: PLR0913 - the signature is transformers'
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - there is none
    *,
    batch: Batch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unknown: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: [1, heads, tokens, head_dim] in, [1, tokens, …] out."""
    if unknown.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    width = query.shape[-1]
    # What is said of the layer itself goes before what its model's class hands over.
    window = getattr(module, "sliding_window", sliding_window)
    output = batch.cache.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        _rows(query),
        _rows(key),
        _rows(value),
        batch=batch,
        look=Look(width**-0.5 if scaling is None else scaling, window or 0, softcap or 0.0),
    )
    return output.view(1, -1, query.shape[1], width), None


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens, head_dim] to [tokens, heads, head_dim], a token's heads side by side."""
    rows = heads[0].transpose(0, 1)
    dense = rows.stride(2) == 1 and rows.stride(1) == rows.shape[2]
    return rows if dense else rows.contiguous()


def register() -> None:
    """Make the attention function known to transformers."""
    AttentionInterface.register(NAME, attend)
