"""A scheduled step to logits: the model's weights, its KV cache, and one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pinaivu_node.engine.batching.scheduler import Chunk
from pinaivu_node.engine.model.attention import Batch, KvCache


class StepCache(KvCache, Protocol):
    """A KV cache that knows what its kernels want to be told of a step."""

    def batch(self, chunks: torch.Tensor, tables: torch.Tensor) -> Batch:
        """The step, described; both arguments as in `Batch`."""
        ...


class Runner:
    """One model with its cache, on one device."""

    def __init__(self, model: Any, cache: StepCache) -> None:
        self._model = model
        self._cache = cache
        self._device: torch.device = model.device

    @torch.inference_mode()
    def compute(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits [rows of all chunks, vocabulary], float32, in the order of the chunks.

        The keys and values of all tokens of the step are in the cache afterwards.
        """
        tokens: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        rows: list[tuple[int, int, int, int]] = []
        for number, chunk in enumerate(chunks):
            added = chunk.tokens
            rows.append((len(tokens), len(added), chunk.start, number))
            tokens += added
            positions += range(chunk.start, chunk.start + len(added))
            last += range(len(tokens) - chunk.rows, len(tokens))
        batch = self._cache.batch(torch.tensor(rows), _tables(chunks))
        # A pass without a draw still has to name a row; its logits are dropped.
        logits: torch.Tensor = self._model(
            input_ids=torch.tensor([tokens], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            batch=batch,
            logits_to_keep=torch.tensor(last or [0], device=self._device),
        ).logits
        return logits[0, : len(last)].float()


def _tables(chunks: Sequence[Chunk]) -> torch.Tensor:
    longest = max(len(chunk.sequence.blocks) for chunk in chunks)
    return torch.tensor(
        [chunk.sequence.blocks + [0] * (longest - len(chunk.sequence.blocks)) for chunk in chunks]
    )
