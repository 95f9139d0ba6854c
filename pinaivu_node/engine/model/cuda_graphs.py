"""Decode steps recorded once and replayed: what a GPU does in them, without being told each time.

Telling a GPU of a kernel takes the CPU some 5 µs, and a step of a model of thirty layers has some
seven hundred.  A recording has fixed sizes and addresses, so there is one for each of a few numbers
of rows.  A step is written into the buffers of the next larger one; the rows that it leaves over
read and write the cache's spare page, and nobody reads what they say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from pinaivu_node.engine.model.cuda_cache import CudaKvCache, PlacedBatch
from pinaivu_node.engine.model.paged_attention import Place
from pinaivu_node.engine.model.step import Step
from pinaivu_node.engine.model.transfer import sent

logger = logging.getLogger(__name__)

Compute = Callable[[], torch.Tensor]
"""Something to compute on a GPU; what it returns lies at the same address every time."""
Recorder = Callable[[Compute], Compute]
"""To something that does the same again."""

_REPLAY_TOLERANCE: Final = 0.05
"""Of logits: libraries may choose other kernels where they cannot take memory."""
_MOST_ROWS: Final = 512
"""A step of more rows keeps a GPU busy for longer than the CPU needs to tell it of the next."""


def row_counts(most: int) -> list[int]:
    """Of how many rows recordings are made, for steps of at most so many; ascending."""
    counts = [1]
    while counts[-1] < min(most, _MOST_ROWS):
        counts.append(2 * counts[-1])
    return counts


class DecodeBuffers:
    """The inputs of a decode step of so many rows, always at the same addresses."""

    def __init__(self, cache: CudaKvCache, rows: int) -> None:
        device = cache.device
        pages = -(-cache.window // cache.page)
        self.rows = rows
        self._cache = cache
        self._wide = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.tokens, self.positions, slots = self._wide
        counting = torch.arange(rows + 1, dtype=torch.int32, device=device)
        place = Place(
            slots=slots,
            tables=torch.zeros(rows, pages, dtype=torch.int32, device=device),
            starts=counting,
            reaches=counting * (pages * cache.page),
            lengths=torch.ones(rows, dtype=torch.int32, device=device),
            spans=tuple((row, 1, 0) for row in range(rows)),
        )
        # Nothing that runs on a GPU reads the two on the CPU, and they are not of any one step.
        nothing = torch.zeros(0, dtype=torch.int64)
        self.batch = PlacedBatch(cache, nothing, nothing, place)
        self.fill(Step([], [], [], []))

    def fill(self, step: Step) -> None:
        """Write a decode step into them, without waiting until it is there."""
        cache, place = self._cache, self.batch.place
        spare = self.rows - len(step.tokens)
        positions = step.positions
        slots = [
            step.tables[row][at // cache.page] * cache.page + at % cache.page
            for at, (_, _, _, row) in zip(positions, step.chunks, strict=True)
        ]
        wide = [
            step.tokens + [0] * spare,
            positions + [0] * spare,
            slots + [cache.spare_page * cache.page] * spare,
        ]
        width = max(1, len(step.tables[0]) if step.tables else 0)
        padding = [cache.spare_page] + [0] * (width - 1)
        tables = [step.tables[row] for _, _, _, row in step.chunks] + [padding] * spare
        lengths = [[at + 1] for at in positions] + [[1]] * spare
        narrow = [a + b for a, b in zip(lengths, tables, strict=True)]
        self._wide.copy_(sent(torch.tensor(wide), cache.device))
        there = sent(torch.tensor(narrow, dtype=torch.int32), cache.device)
        place.lengths.copy_(there[:, 0])
        place.tables[:, :width].copy_(there[:, 1:])


class DecodeGraphs:
    """A recording for each of a few numbers of rows."""

    def __init__(self) -> None:
        self._recorded: list[tuple[DecodeBuffers, Compute]] = []
        """Ascending by rows."""

    @torch.inference_mode()
    def record(
        self,
        model: Any,
        cache: CudaKvCache,
        *,
        counts: Sequence[int],
        recorder: Recorder,
        progress: Callable[[int], None],
    ) -> None:
        """Record steps of so many rows each, `progress` told of each before.

        RuntimeError if the model does something that cannot be recorded; what was recorded before
        stays.
        """
        # The largest first: the smaller ones then make do with the memory that it took.
        for rows in sorted(counts, reverse=True):
            progress(rows)
            buffers = DecodeBuffers(cache, rows)
            replay = recorder(_decode(model, buffers))
            self._recorded.insert(0, (buffers, replay))

    @torch.inference_mode()
    def replay(self, step: Step) -> torch.Tensor | None:
        """The step's logits, which hold until the next one; None if there is no recording of it."""
        if not step.is_decoding:
            return None
        for buffers, replay in self._recorded:
            if buffers.rows >= len(step.tokens):
                buffers.fill(step)
                return replay()[: len(step.tokens)]
        return None


def _decode(model: Any, buffers: DecodeBuffers) -> Compute:
    def compute() -> torch.Tensor:
        buffers.batch.place.masks.clear()  # else the recording would use the first step's
        logits: torch.Tensor = model(
            input_ids=buffers.tokens[None],
            position_ids=buffers.positions[None],
            use_cache=False,
            batch=buffers.batch,
        ).logits
        return logits[0].float()

    return compute


class CudaRecorder:
    """Records on the current CUDA device; all recordings share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, compute: Compute) -> Compute:
        """RuntimeError if it cannot be recorded."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            # Libraries take their work space when they are first used, and not while it is
            # recorded.
            for _ in range(2):
                expected = compute()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Of other threads, only this one's calls count: that of NCCL asks after its events.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = compute()
        self._pool = graph.pool()
        graph.replay()
        if not torch.allclose(output, expected, rtol=_REPLAY_TOLERANCE, atol=_REPLAY_TOLERANCE):
            raise RuntimeError("a recorded step says something else than the step itself")

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay
