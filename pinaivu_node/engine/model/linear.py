"""Linear layers on a CPU, by kernels whose sums do not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from pinaivu_node.engine.kernels import amx, amx_int8, linear
from pinaivu_node.engine.kernels.vectors import LANES
from pinaivu_node.engine.model.quantised import Int8Linear

_AMX_GROUP: Final = 4 * amx.LANES
"""Outputs that the kernel for AMX computes at once."""


class PackedLinear(nn.Module):
    """A linear layer with its weights laid out for the kernel that runs it."""

    dtype: torch.dtype
    """Of inputs and outputs."""

    def __init__(self, layers: Sequence[nn.Linear | Int8Linear]) -> None:
        """Side by side, if there are several: their outputs are concatenated."""
        super().__init__()
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        self._bias = torch.cat([_bias(layer) for layer in layers]).float()
        self._threads = torch.get_num_threads()
        self._run = self._packed(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in_features] to […, out_features]."""
        x = x.contiguous()
        rows = x.numel() // self.in_features
        product: torch.Tensor = self._run(x, rows)
        return product.view(*x.shape[:-1], self.out_features)

    def _packed(self, layers: Sequence[nn.Linear | Int8Linear]) -> Any:
        if quantised := [layer for layer in layers if isinstance(layer, Int8Linear)]:
            self.dtype = quantised[0].dtype
            values = _joined([layer.rows.values for layer in quantised])
            scales = _joined([layer.rows.scales for layer in quantised])
            if amx.is_here():
                return _Int8Amx(values, scales, self._bias, threads=self._threads)
            return _Int8(values, scales, self._bias)
        weight = _joined(
            [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
        ).detach()
        self.dtype = weight.dtype
        if weight.dtype is torch.float32:
            return _Float32(weight, self._bias, threads=self._threads)
        if amx.is_here():
            return _Amx(weight, self._bias, threads=self._threads)
        return _BFloat16(weight, self._bias)


class _Float32:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, threads: int) -> None:
        self._outputs, self._width = weight.shape
        weight = _padded(weight, (0, 0, 0, -self._outputs % LANES))
        self._panels = len(weight) // LANES
        self._weight = _panels(weight, LANES)
        self._bias = _padded(bias, (0, len(weight) - self._outputs))
        self._threads = threads

    def __call__(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        out = x.new_empty(rows, self._panels * LANES)
        arguments = (
            x.data_ptr(), rows, self._width, self._weight.data_ptr(), self._bias.data_ptr(),
            out.data_ptr(), self._panels,
        )  # fmt: skip
        if self._threads == 1:
            linear.linear_float32(*arguments)
        else:
            linear.linear_float32_by_all(*arguments, self._threads)
        return _narrowed(out, self._outputs)


class _BFloat16:
    """For processors without AMX."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._outputs, self._width = weight.shape
        weight = _padded(weight, (0, 0, 0, -self._outputs % LANES))
        self._panels = len(weight) // LANES
        self._weight = _panels(weight, LANES)
        self._bias = _padded(bias, (0, len(weight) - self._outputs))

    def __call__(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        out = x.new_empty(rows, self._panels * LANES)
        scratch = torch.empty(x.numel())
        linear.linear_bfloat16(
            x.data_ptr(), rows, self._width, self._weight.data_ptr(), self._bias.data_ptr(),
            out.data_ptr(), self._panels, scratch.data_ptr(),
        )  # fmt: skip
        return _narrowed(out, self._outputs)


class _Amx:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, threads: int) -> None:
        self._outputs, width = weight.shape
        self._padding = -width % amx.GRAIN
        weight = _padded(weight, (0, self._padding, 0, -self._outputs % _AMX_GROUP))
        self._width = width + self._padding
        self._groups = len(weight) // _AMX_GROUP
        pairs = weight.view(-1, amx.LANES, self._width // 2, 2)
        self._weight = pairs.transpose(1, 2).contiguous()
        self._bias = _padded(bias, (0, len(weight) - self._outputs))
        self._threads = threads
        self._scratch = torch.empty(threads * amx.SCRATCH_FLOATS)

    def __call__(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        out = x.new_empty(rows, self._groups * _AMX_GROUP)
        if self._padding:
            x = _padded(x.view(rows, -1), (0, self._padding))
        arguments = (
            x.data_ptr(), rows, self._width, self._weight.data_ptr(), self._bias.data_ptr(),
            out.data_ptr(), self._groups, self._scratch.data_ptr(),
        )  # fmt: skip
        if self._threads == 1:
            amx.linear(*arguments)
        else:
            amx.linear_by_all(*arguments, self._threads)
        return _narrowed(out, self._outputs)


class _Int8Amx:
    def __init__(
        self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, *, threads: int
    ) -> None:
        self._outputs, self._width = values.shape
        missing = -self._outputs % _AMX_GROUP
        values = _padded(values, (0, -self._width % amx_int8.GRAIN, 0, missing))
        self._groups, self._padded = len(values) // _AMX_GROUP, values.shape[1]
        fours = values.view(-1, amx.LANES, self._padded // 4, 4)
        self._weight = fours.transpose(1, 2).contiguous()
        self._scales, self._bias = _padded(scales, (0, missing)), _padded(bias, (0, missing))
        self._addresses = tuple(
            each.data_ptr() for each in (self._weight, self._scales, self._bias)
        )
        self._threads = threads
        self._scratch = torch.empty(threads * amx.SCRATCH_FLOATS)

    def __call__(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        out = x.new_empty(rows, self._groups * _AMX_GROUP)
        split = torch.empty(rows * (2 * self._padded + 4), dtype=torch.int8)
        arguments = (
            x.data_ptr(), rows, self._width, split.data_ptr(), self._padded, self._addresses,
            out.data_ptr(), self._groups, self._scratch.data_ptr(),
        )  # fmt: skip
        one, all_ = _INT8_KERNELS[x.dtype]
        if self._threads == 1:
            one(*arguments)
        else:
            all_(*arguments, self._threads)
        return _narrowed(out, self._outputs)


_INT8_KERNELS: Final = {
    torch.float32: (amx_int8.linear_float32, amx_int8.linear_float32_by_all),
    torch.bfloat16: (amx_int8.linear_bfloat16, amx_int8.linear_bfloat16_by_all),
}


class _Int8:
    """For processors without AMX: weights become float32 on their way to the sums."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> None:
        self._outputs, self._width = values.shape
        missing = -self._outputs % LANES
        self._weight = _panels(_padded(values, (0, 0, 0, missing)), LANES)
        self._scales = _padded(scales, (0, missing))
        self._bias = _padded(bias / scales, (0, missing))

    def __call__(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        numbers = x.float()
        out = numbers.new_empty(rows, len(self._weight) * LANES)
        linear.linear_int8(
            numbers.data_ptr(), rows, self._width, self._weight.data_ptr(), self._bias.data_ptr(),
            out.data_ptr(), len(self._weight),
        )  # fmt: skip
        return _narrowed(out.mul_(self._scales).to(x.dtype), self._outputs)


def _bias(layer: nn.Linear | Int8Linear) -> torch.Tensor:
    if layer.bias is None:
        return torch.zeros(layer.out_features)
    return layer.bias.detach()


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `torch.cat`, without a copy of a single one."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _padded(tensor: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """As `torch.nn.functional.pad`, without a copy where nothing is added."""
    return functional.pad(tensor, widths) if any(widths) else tensor


def _panels(weight: torch.Tensor, lanes: int) -> torch.Tensor:
    """[outputs, inputs] to [outputs / lanes, inputs, lanes]."""
    return weight.view(-1, lanes, weight.shape[1]).transpose(1, 2).contiguous()


def _narrowed(out: torch.Tensor, outputs: int) -> torch.Tensor:
    return out if out.shape[1] == outputs else out[:, :outputs].contiguous()
