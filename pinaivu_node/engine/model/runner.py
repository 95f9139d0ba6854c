"""A scheduled step to logits: the model's weights, its KV cache, and one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pinaivu_node.engine.batching.scheduler import Chunk
from pinaivu_node.engine.model.attention import Batch, KvCache
from pinaivu_node.engine.model.cuda_graphs import DecodeGraphs
from pinaivu_node.engine.model.step import Step, step_of
from pinaivu_node.engine.model.transfer import sent


class StepCache(KvCache, Protocol):
    """A KV cache that knows what its kernels want to be told of a step."""

    def batch(self, chunks: torch.Tensor, tables: torch.Tensor) -> Batch:
        """The step, described; both arguments as in `Batch`."""
        ...


class StepRunner(Protocol):
    """What computes steps: here, or here and on other devices at once."""

    def compute(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits [rows of all chunks, vocabulary], float32, in the order of the chunks.

        They hold until the next step.  The keys and values of all tokens of the step are in the
        cache afterwards.
        """
        ...

    def forward(self, step: Step) -> torch.Tensor:
        """The same of a step in plain numbers."""
        ...

    def survives(self, error: Exception) -> bool:
        """Whether the next step can be computed after this one failed so."""
        ...


class Runner:
    """One model with its cache, on one device."""

    def __init__(self, model: Any, cache: StepCache, *, graphs: DecodeGraphs | None = None) -> None:
        self._model = model
        self._cache = cache
        self._device: torch.device = model.device
        self._graphs = graphs

    def compute(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """See `StepRunner.compute`."""
        return self.forward(step_of(chunks))

    @torch.inference_mode()
    def forward(self, step: Step) -> torch.Tensor:
        """See `StepRunner.forward`."""
        if self._graphs is not None and (replayed := self._graphs.replay(step)) is not None:
            return replayed
        batch = self._cache.batch(torch.tensor(step.chunks), torch.tensor(step.tables))
        ids, positions = sent(torch.tensor([step.tokens, step.positions]), self._device)
        # A pass without a draw still has to name a row; its logits are dropped.
        last = sent(torch.tensor(step.last or [0]), self._device)
        logits: torch.Tensor = self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            batch=batch,
            logits_to_keep=last,
        ).logits
        return logits[0, : len(step.last)].float()

    def survives(self, error: Exception) -> bool:
        """See `StepRunner.survives`.

        After an error on CUDA nothing that its context says can be believed, but for memory that
        was refused: that is torch's own doing, and happens before anything is computed with it.
        """
        return self._device.type == "cpu" or isinstance(error, torch.OutOfMemoryError)
