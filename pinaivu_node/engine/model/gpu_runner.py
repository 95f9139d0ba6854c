"""A model that is on a GPU, made ready for steps: memory measured, pages taken, decode recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.model.cpu_cache import KvShape
from pinaivu_node.engine.model.cuda_cache import CudaKvCache
from pinaivu_node.engine.model.cuda_graphs import (
    CudaRecorder,
    DecodeGraphs,
    Recorder,
    row_counts,
)
from pinaivu_node.engine.model.gpu_memory import Memory, measured, pages_that_fit
from pinaivu_node.engine.model.paged_attention import (
    FLASH_PAGE,
    Attention,
    attention_for,
    flash,
    gathered,
)
from pinaivu_node.engine.model.pretrained import Progress
from pinaivu_node.engine.model.runner import Runner
from pinaivu_node.engine.model.step import Step
from pinaivu_node.engine.sampling.sampler import Draw, SequenceSampling, choose
from pinaivu_node.engine.types import SamplingParams

logger = logging.getLogger(__name__)

_GATHERED_PAGE: Final = 64
"""Positions per page where FlashAttention asks for nothing: the smaller, the more is shared."""
_COPIES: Final = 2
"""Of one layer's keys and values that `gathered` makes at a time."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What is done with a device besides computing."""

    attention: Attention
    measure: Callable[[Callable[[], object]], Memory]
    """What this work takes, and what there is."""
    recorder: Recorder | None
    """None: nothing is recorded."""
    agree: Callable[[int], int]
    """Of the pages that fit here, how many all GPUs that share the model have."""

    @property
    def page(self) -> int:
        """Positions per page."""
        return FLASH_PAGE if self.attention is flash else _GATHERED_PAGE


@dataclass(frozen=True, slots=True)
class GpuRunner:
    """A runner, and what there is for its scheduler to plan with."""

    runner: Runner
    pages: int
    page: int
    window: int


def on_gpu(
    model: Any,
    shape: KvShape,
    config: EngineConfig,
    *,
    window: int,
    agree: Callable[[int], int],
    progress: Progress,
) -> GpuRunner:
    """Make the most of the GPU that the model is on; LoadError if there is no room for a cache.

    The model's attention is ours already.  `agree` is as in `Gpu`.
    """
    device: torch.device = model.device
    torch.cuda.set_device(device)  # where recordings are made
    attention = _attention(model, shape)
    # Steps over pages that are gathered would be recorded with the longest tables.
    records = config.cuda_graphs and attention is flash and not looks_at_positions(model)
    gpu = Gpu(
        attention=attention,
        measure=partial(measured, device=device),
        recorder=CudaRecorder() if records else None,
        agree=agree,
    )
    return made_ready(model, shape, config, gpu=gpu, window=window, progress=progress)


def made_ready(
    model: Any, shape: KvShape, config: EngineConfig, *, gpu: Gpu, window: int, progress: Progress
) -> GpuRunner:
    """As `on_gpu`, with whatever the device is told or asked given."""
    page, most = gpu.page, config.most_running(on_cpu=False)

    def cache_of(pages: int) -> CudaKvCache:
        return CudaKvCache(
            shape,
            pages=pages,
            window=window,
            device=model.device,
            page=page,
            attention=gpu.attention,
        )

    progress(0.7, "measuring the GPU's memory")
    step = largest_step(prompt=config.prefill_chunk, rows=most, window=window, page=page)
    memory = gpu.measure(lambda: _work(model, cache_of, step))
    if gpu.recorder is not None:  # recordings have a work space of their own
        memory = replace(memory, work=2 * memory.work)
    fitting = pages_that_fit(
        memory,
        fraction=config.memory_fraction,
        page_bytes=_page_bytes(shape, page, gpu.attention),
        kv_cache_gb=config.kv_cache_gb,
    )
    pages = gpu.agree(fitting)
    window = min(window, pages * page)
    cache = cache_of(pages)
    graphs = None
    if gpu.recorder is not None:
        graphs = _recorded(model, cache, gpu.recorder, most=most, progress=progress)
    return GpuRunner(Runner(model, cache, graphs=graphs), pages, page, window)


def largest_step(*, prompt: int, rows: int, window: int, page: int) -> Step:
    """A step as large as any will be: so many tokens of prompts, and so many rows of logits.

    In a cache that has pages for it and for nothing else.
    """
    total = prompt + rows
    chunks, tables = [], []
    first_page = 0
    for number, first in enumerate(range(0, total, window)):
        count = min(window, total - first)
        pages = -(-count // page)
        chunks.append((first, count, 0, number))
        tables.append(list(range(first_page, first_page + pages)))
        first_page += pages
    width = max(map(len, tables))
    return Step(
        tokens=[0] * total,
        last=list(range(total - rows, total)),
        chunks=chunks,
        tables=[table + [0] * (width - len(table)) for table in tables],
    )


def looks_at_positions(model: Any) -> bool:
    """Whether the CPU waits for the largest position of a step, to choose a rotation by it.

    That cannot be recorded.
    """
    types = [getattr(module, "rope_type", None) for module in model.modules()]
    names = [
        name for each in types for name in (each.values() if isinstance(each, dict) else [each])
    ]
    return any("dynamic" in str(name) or str(name) == "longrope" for name in names)


def _attention(model: Any, shape: KvShape) -> Attention:
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        return gathered
    return attention_for(model.device, shape.dtype, head_dim=shape.head_dim)


def _work(model: Any, cache_of: Callable[[int], CudaKvCache], step: Step) -> None:
    """A large step, with pages for it alone, and the draws after it."""
    pages = 1 + max(page for table in step.tables for page in table)
    logits = Runner(model, cache_of(pages)).forward(step)
    vocabulary = logits.shape[1]
    params = SamplingParams(max_tokens=1, top_k=50, top_p=0.9, logprobs=20, logit_bias={0: 1.0})
    state = SequenceSampling(
        params, seed=0, prompt=(), answer=(), vocabulary=vocabulary, device=model.device
    )
    allowed = torch.full((-(-vocabulary // 32),), -1, dtype=torch.int32)
    choose(logits, [Draw(state, 0, allowed)] * len(logits))


def _page_bytes(shape: KvShape, page: int, attention: Attention) -> int:
    """Of the cache, and of what is copied of it at times."""
    whole = 2 * shape.layers * shape.heads * shape.head_dim * page * shape.dtype.itemsize
    return whole if attention is flash else whole + _COPIES * whole // shape.layers


def _recorded(
    model: Any, cache: CudaKvCache, recorder: Recorder, *, most: int, progress: Progress
) -> DecodeGraphs | None:
    counts = row_counts(most)
    graphs = DecodeGraphs()

    def say(rows: int) -> None:
        done = 1 - counts.index(rows) / len(counts)
        progress(0.75 + 0.15 * done, f"recording decode steps of {rows}")

    try:
        graphs.record(model, cache, counts=counts, recorder=recorder, progress=say)
    except RuntimeError as exc:  # includes that memory for it was refused
        reason = str(exc).partition("\n")[0]
        logger.warning("decode steps are not recorded, which makes them slower: %s", reason)
        return None
    return graphs
