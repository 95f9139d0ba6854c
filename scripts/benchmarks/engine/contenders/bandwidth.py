"""How fast one core reads memory that is in no cache of its own."""

from __future__ import annotations

import mmap
import time
from typing import Any, Final

import numba
import numpy as np

BYTES: Final = 2**30
_ROUNDS: Final = 3


@numba.njit(cache=False)  # type: ignore[untyped-decorator]
def _one_front(words: Any) -> Any:
    total = np.int64(0)
    for place in range(words.size):
        total ^= words[place]
    return total


@numba.njit(cache=False)  # type: ignore[untyped-decorator]
def _four_fronts(words: Any) -> Any:
    quarter = words.size // 4
    a = b = c = d = np.int64(0)
    for place in range(quarter):
        a ^= words[place]
        b ^= words[place + quarter]
        c ^= words[place + 2 * quarter]
        d ^= words[place + 3 * quarter]
    return a ^ b ^ c ^ d


def read_bandwidth() -> float:
    """Bytes per CPU second: the best of two ways to read a gibibyte, on small and huge pages."""
    best = 0.0
    for huge in (False, True):
        memory = mmap.mmap(-1, BYTES)
        if huge:
            memory.madvise(mmap.MADV_HUGEPAGE)
        words = np.frombuffer(memory, dtype=np.int64)
        words[:] = 1
        for kernel in (_one_front, _four_fronts):
            kernel(words[:4096])
            for _ in range(_ROUNDS):
                began = time.process_time()
                kernel(words)
                best = max(best, BYTES / (time.process_time() - began))
        del words
        memory.close()
    return best
