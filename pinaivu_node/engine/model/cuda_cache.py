"""The KV cache on a GPU: pages in one tensor per layer, found through block tables.

Nothing in it is CUDA's own but the kernels that `attention_for` finds for the device, so the same
class runs on a CPU, where the tests compare it with the CPU's own cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pinaivu_node.engine.model.attention import Batch, Look
from pinaivu_node.engine.model.paged_attention import (
    FLASH_PAGE,
    Attention,
    Place,
    gathered,
    placed,
)

if TYPE_CHECKING:
    from pinaivu_node.engine.model.cpu_cache import KvShape


@dataclass(frozen=True, slots=True)
class PlacedBatch(Batch):
    """A step whose description is on the GPU."""

    place: Place


class CudaKvCache:
    """A `KvCache` of pages on any device."""

    def __init__(
        self,
        shape: KvShape,
        *,
        pages: int,
        window: int,
        device: torch.device,
        page: int = FLASH_PAGE,
        attention: Attention = gathered,
    ) -> None:
        """Takes its memory now, and one page more than asked for.

        torch.OutOfMemoryError if there is not enough.
        """
        self.page = page
        self.window = window
        self.device = device
        self.spare_page = pages
        """Holds nothing: what the padding of a recorded step writes goes there."""
        sizes = (shape.layers, pages + 1, page, shape.heads, shape.head_dim)
        # Zeros and not whatever was there: see `gathered`.
        self.keys = torch.zeros(sizes, dtype=shape.dtype, device=device)
        self.values = torch.zeros(sizes, dtype=shape.dtype, device=device)
        self._attention = attention

    def batch(self, chunks: torch.Tensor, tables: torch.Tensor) -> PlacedBatch:
        """See `StepCache.batch`; ValueError or IndexError if a position is beyond the window or
        the pages.
        """
        if int((chunks[:, 1] + chunks[:, 2]).max()) > self.window:
            raise ValueError("a position beyond the context window")
        spans = tuple((first, count, start) for first, count, start, _ in chunks.tolist())
        place = placed(spans, tables[chunks[:, 3]], page=self.page, device=self.device)
        return PlacedBatch(self, chunks, tables, place)

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
        if not isinstance(batch, PlacedBatch):
            raise TypeError("a batch of another kind of cache")
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 1).index_copy_(0, batch.place.slots, key)
        values.flatten(0, 1).index_copy_(0, batch.place.slots, value)
        attention = gathered if look.softcap else self._attention
        return attention(query, keys, values, batch.place, look).flatten(1)
