"""The KV cache on the CPU: pages in one block of memory per layer, walked by our own kernel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
import torch

from pinaivu_node.engine import kernels
from pinaivu_node.engine.kernels.attention import padded, scratch_floats
from pinaivu_node.engine.kernels.attention_tiles import PAGE
from pinaivu_node.engine.model.attention import Batch, Look


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one position takes."""

    layers: int
    heads: int
    """KV heads; the query heads of a group share one."""
    head_dim: int
    dtype: torch.dtype

    def page_bytes(self, page: int) -> int:
        """Bytes of one page over all layers, keys and values."""
        return 2 * self.layers * self.heads * padded(self.head_dim) * page * self.dtype.itemsize


class CpuKvCache:
    """A `KvCache` of float32 or bfloat16 pages."""

    page = PAGE

    def __init__(self, shape: KvShape, *, pages: int, window: int) -> None:
        """Memory is taken from the system when a page is first written."""
        pages_of_layer = (shape.layers, pages, shape.heads)
        width = padded(shape.head_dim)
        self.keys = _zeros((*pages_of_layer, width, PAGE), shape.dtype)
        """Transposed: [layer, page, head, head_dim, position]."""
        self.values = _zeros((*pages_of_layer, PAGE, width), shape.dtype)
        self._layers: Final = tuple(
            (keys.data_ptr(), values.data_ptr())
            for keys, values in zip(self.keys, self.values, strict=True)
        )
        self._shape = shape
        self._window = window
        self._attend = kernels.of(shape.dtype).attend
        self._scratch = torch.empty(scratch_floats(window=window, head_dim=shape.head_dim))

    def batch(self, chunks: torch.Tensor, tables: torch.Tensor) -> Batch:
        """See `StepCache.batch`; ValueError if a position is beyond the window."""
        # The kernel's scratch memory is as long as the window, and it checks nothing.
        if int((chunks[:, 1] + chunks[:, 2]).max()) > self._window:
            raise ValueError("a position beyond the context window")
        return Batch(self, chunks, tables)

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
        """See `KvCache.attend`."""
        tokens, heads, width = query.shape
        # The kernel reads as far as it is told; an architecture's config may tell otherwise.
        if not key.shape == value.shape == (tokens, self._shape.heads, width):
            raise ValueError(f"keys of {(*key.shape,)}, values of {(*value.shape,)}")
        output = query.new_empty(tokens, heads * width)
        self._attend(
            (query.data_ptr(), key.data_ptr(), value.data_ptr(), output.data_ptr()),
            (query.stride(0), key.stride(0), value.stride(0)),
            self._layers[layer],
            batch.chunks.data_ptr(),
            len(batch.chunks),
            batch.tables.data_ptr(),
            (heads, self._shape.heads, width, batch.tables.shape[1]),
            self._scratch.data_ptr(),
            (np.float32(look.scale), look.window, np.float32(look.softcap)),
        )
        return output


def _zeros(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As torch.zeros, but for memory that the system gives page by page when it is written."""
    raw = np.zeros(prod(sizes) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(sizes)
