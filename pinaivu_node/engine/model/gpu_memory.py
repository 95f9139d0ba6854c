"""How many pages of keys and values a GPU holds beside the weights and the work space of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from pinaivu_node.engine.model.weights import LoadError

logger = logging.getLogger(__name__)

_GIB: Final = 2**30
_LEAST_PAGES: Final = 2
"""A conversation of fewer is none."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one GPU, in bytes."""

    total: int
    used: int
    """By anybody: weights of this model, other models, other programs."""
    work: int
    """What a step takes besides."""


def pages_that_fit(
    memory: Memory, *, fraction: float, page_bytes: int, kv_cache_gb: float | None = None
) -> int:
    """Pages within a fraction of a GPU's memory, or in what the operator gave; LoadError if none.

    One page of what is found is left out: the cache takes a spare one.
    """
    left = int(fraction * memory.total) - memory.used - memory.work
    if kv_cache_gb is not None:
        left = int(kv_cache_gb * _GIB)
    pages = left // page_bytes - 1
    if pages < _LEAST_PAGES:
        raise LoadError(_nothing_left(memory, fraction, page_bytes, kv_cache_gb))
    return pages


def _nothing_left(
    memory: Memory, fraction: float, page_bytes: int, kv_cache_gb: float | None
) -> str:
    if kv_cache_gb is not None:
        return (
            f"kv_cache_gb {kv_cache_gb} is too little for keys and values of this model: "
            f"a page of them takes {page_bytes / _GIB:.3f} GiB, and three are the least"
        )
    return (
        f"no memory is left for keys and values: of the GPU's {memory.total / _GIB:.1f} GiB, "
        f"memory_fraction {fraction} allows {fraction * memory.total / _GIB:.1f}, "
        f"{memory.used / _GIB:.1f} are in use with the model's weights, and a step takes "
        f"{memory.work / _GIB:.1f} to work in: free some, raise memory_fraction, lower "
        "prefill_chunk or max_running, or run a smaller model"
    )


def measured(work: Callable[[], object], device: torch.device) -> Memory:
    """A GPU's memory, and what of it this work took for a while."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    memory = Memory(total=total, used=total - free, work=peak)
    logger.info(
        "of %.1f GiB, %.1f are in use, and a step takes %.2f",
        total / _GIB, memory.used / _GIB, peak / _GIB,
    )  # fmt: skip
    return memory
