"""Attention over pages that a block table names: by FlashAttention, or by gathering the pages.

`flash` is what torch ships: one kernel for decode rows and chunks of prompts alike, reading the
pages where they are.  It is there for GPUs from Ampere on, in 16 bits, without soft caps.
`gathered` is everything else: it copies a sequence's pages side by side and lets torch's scaled dot
product do the rest.  It runs anywhere, on a CPU too, and is what `flash` is measured against.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from pinaivu_node.engine.model.attention import Look
from pinaivu_node.engine.model.transfer import sent

logger = logging.getLogger(__name__)

FLASH_PAGE: Final = 256
"""Positions per page: FlashAttention's kernels want a multiple of so many."""
_FLASH_WIDEST_HEAD: Final = 256
_FLASH_TOLERANCE: Final = 0.05
"""Of the largest difference from `gathered` in values of spread one: bfloat16 keeps eight bits."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tokens of a step are, on the device."""

    slots: torch.Tensor
    """int64 [tokens]: where in the cache, pages taken end to end, each token's keys go."""
    tables: torch.Tensor
    """int32 [chunks, pages]: the pages of each chunk's sequence, in order of position."""
    starts: torch.Tensor
    """int32 [chunks + 1]: running total of the chunks' tokens."""
    reaches: torch.Tensor
    """int32 [chunks + 1]: running total of what the tables could hold; the kernels ask for it."""
    lengths: torch.Tensor
    """int32 [chunks]: positions of each chunk's sequence, these tokens included."""
    spans: tuple[tuple[int, int, int], ...]
    """Of each chunk, on the CPU: first token, tokens, start position."""
    masks: dict[int, torch.Tensor] = field(default_factory=dict)
    """What decode rows may see, by window; made by the first layer that asks."""

    @property
    def longest_chunk(self) -> int:
        """Tokens."""
        return max(count for _, count, _ in self.spans)


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Place, Look], torch.Tensor]
"""Query [tokens, heads, head_dim], keys and values [pages, page, KV heads, head_dim], to [tokens,
heads, head_dim]."""


# --- FlashAttention -------------------------------------------------------------------------------


def flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, place: Place, look: Look
) -> torch.Tensor:
    """By torch's own FlashAttention; CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    longest = place.longest_chunk
    # A single query at the end sees everything; said so, the kernel reads the keys once for all
    # query heads that share them.
    window = (look.window - 1, 0) if look.window else (-1, -1 if longest == 1 else 0)
    output: torch.Tensor = varlen_attn(  # type: ignore[assignment]
        query,
        keys,
        values,
        place.starts,
        place.reaches,
        longest,
        place.tables.shape[1] * keys.shape[1],
        scale=look.scale,
        window_size=window,
        enable_gqa=True,
        seqused_k=place.lengths,
        block_table=place.tables,
        # More than one split gives sums that depend on the batch, and with pages of several
        # sequences wrong ones: https://github.com/pytorch/pytorch/issues/194167
        num_splits=1,
    )
    return output


def attention_for(device: torch.device, dtype: torch.dtype, *, head_dim: int) -> Attention:
    """The fastest attention that computes rightly here."""
    if not flash_may_run(device, dtype, head_dim=head_dim):
        return gathered
    try:
        error = flash_error(device, dtype, head_dim=head_dim)
    except (RuntimeError, ValueError, TypeError) as exc:
        logger.warning("FlashAttention does not run here: %s", str(exc).partition("\n")[0])
        return gathered
    if not error <= _FLASH_TOLERANCE:
        logger.warning("FlashAttention computes wrongly here, off by %.2g", error)
        return gathered
    return flash


def flash_may_run(device: torch.device, dtype: torch.dtype, *, head_dim: int) -> bool:
    """Whether this device and torch have FlashAttention over pages for such heads."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if head_dim % 8 or head_dim > _FLASH_WIDEST_HEAD:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and torch_has_paged_flash()


def torch_has_paged_flash() -> bool:
    """Whether this torch's variable-length attention takes block tables and a number of splits."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"block_table", "seqused_k", "num_splits"} <= inspect.signature(
        varlen_attn
    ).parameters.keys()


@torch.inference_mode()
def flash_error(device: torch.device, dtype: torch.dtype, *, head_dim: int) -> float:
    """How far `flash` is off `gathered` on random pages: decode rows, a chunk, a window."""
    generator = torch.Generator().manual_seed(0)

    def some(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    keys, values = some(4, FLASH_PAGE, 2, head_dim), some(4, FLASH_PAGE, 2, head_dim)
    tables = torch.tensor([[2, 0], [3, 1]])
    worst = 0.0
    for spans in (((0, 1, 299), (1, 1, 6)), ((0, 5, 300), (5, 1, 0))):
        place = placed(spans, tables, page=FLASH_PAGE, device=device)
        query = some(sum(count for _, count, _ in spans), 6, head_dim)
        for window in (0, 40):
            look = Look(head_dim**-0.5, window)
            right = gathered(query, keys, values, place, look)
            ours = flash(query, keys, values, place, look)
            worst = max(worst, float((ours.float() - right.float()).abs().max()))
    return worst


# --- pages side by side ---------------------------------------------------------------------------


def gathered(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, place: Place, look: Look
) -> torch.Tensor:
    """By torch's scaled dot product over copies of the pages; anywhere."""
    output = torch.empty_like(query)
    single = [row for row, (_, count, _) in enumerate(place.spans) if count == 1]
    if len(single) == len(query):  # a step of nothing but next tokens
        return _of_single_rows(query, keys, values, place, look, slice(None))
    if single:
        first = torch.tensor([place.spans[row][0] for row in single], device=query.device)
        rows = torch.tensor(single, device=query.device)
        output[first] = _of_single_rows(query[first], keys, values, place, look, rows)
    for row, (first_token, count, start) in enumerate(place.spans):
        if count > 1:
            tokens = slice(first_token, first_token + count)
            pages = place.tables[row].long()
            output[tokens] = _of_chunk(query[tokens], keys[pages], values[pages], start, look)
    return output


def _of_single_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    place: Place,
    look: Look,
    rows: torch.Tensor | slice,
) -> torch.Tensor:
    """One query each of several sequences, which are padded to the longest table."""
    pages = place.tables[rows].long()
    batch, heads = len(query), keys.shape[2]
    mask = _single_mask(place, look.window, pages.shape[1] * keys.shape[1])[rows]
    # What a page held before may be no number at all, and nothing times that is not nothing.
    unused = ~mask.view(batch, -1, 1, 1)
    key, value = (
        each[pages].flatten(1, 2).masked_fill(unused, 0).transpose(1, 2) for each in (keys, values)
    )
    # The query heads that share a KV head stand where other queries would.
    grouped = query.view(batch, heads, -1, query.shape[-1])
    return _attended(grouped, key, value, mask.view(batch, 1, 1, -1), look).view_as(query)


def _single_mask(place: Place, window: int, reach: int) -> torch.Tensor:
    """A truth value for each of [chunks, reach]: what the last query of each chunk sees."""
    mask = place.masks.get(window)
    if mask is None:
        positions = torch.arange(reach, device=place.lengths.device)
        ends = place.lengths.unsqueeze(1)
        mask = positions < ends
        if window:
            mask &= positions >= ends - window
        place.masks[window] = mask
    return mask


def _of_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, look: Look
) -> torch.Tensor:
    """Several queries of one sequence, from position `start` on."""
    count, heads, width = query.shape
    end = start + count
    keys, values = (each.flatten(0, 1)[:end].transpose(0, 1) for each in (keys, values))
    at = torch.arange(start, end, device=query.device).unsqueeze(1)
    positions = torch.arange(end, device=query.device)
    mask = positions <= at
    if look.window:
        mask &= positions > at - look.window
    groups = heads // len(keys)
    # [KV heads, heads of one · tokens, head_dim]: as above.
    grouped = query.view(count, -1, groups, width).permute(1, 2, 0, 3).flatten(1, 2)
    # With four dimensions, or torch takes its slowest kernel.
    output = _attended(grouped[None], keys[None], values[None], mask.repeat(groups, 1), look)
    return output.view(-1, groups, count, width).permute(2, 0, 1, 3).reshape(count, heads, width)


def _attended(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, look: Look
) -> torch.Tensor:
    if not look.softcap:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=look.scale)
    scores = (query @ keys.transpose(-1, -2)).float() * (look.scale / look.softcap)
    scores = (scores.tanh() * look.softcap).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(values.dtype) @ values


# --- where the tokens of a step are ---------------------------------------------------------------


def placed(
    spans: tuple[tuple[int, int, int], ...],
    tables: torch.Tensor,
    *,
    page: int,
    device: torch.device,
) -> Place:
    """The place of chunks that lie end to end, whose pages are the rows of `tables`, on the CPU.

    IndexError if a position is beyond the pages: a GPU would not notice.
    """
    _, counts, begins = torch.tensor(spans).unbind(1)
    rows = torch.arange(len(spans)).repeat_interleave(counts)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    positions = torch.arange(len(rows)) - (starts[:-1] - begins).repeat_interleave(counts)
    slots = tables[rows, positions // page] * page + positions % page
    chunks = len(spans)
    reach = tables.shape[1] * page
    integers = [starts, torch.arange(chunks + 1) * reach, begins + counts, tables.flatten()]
    # One transfer for all of them.
    there = sent(torch.cat(integers).int(), device)
    cuts = [chunks + 1, 2 * chunks + 2, 3 * chunks + 2]
    starts_there, reaches, lengths, flat_tables = there.tensor_split(cuts)
    return Place(
        slots=sent(slots, device),
        tables=flat_tables.view(tables.shape),
        starts=starts_there,
        reaches=reaches,
        lengths=lengths,
        spans=spans,
    )
