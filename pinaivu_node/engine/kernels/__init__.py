"""Numba kernels for the CPU, each in the place of a chain of small torch operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from pinaivu_node.engine.kernels import attention, layers, rotary


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels for tensors of one format; each is documented where it is made."""

    attend: Any
    rms_norm: Any
    add_rms_norm: Any
    silu_gated: Any
    gelu_gated: Any
    rotate: Any
    head_norm: Any


FLOAT32: Final = Kernels(
    attend=attention.attend_float32,
    rms_norm=layers.rms_norm_float32,
    add_rms_norm=layers.add_rms_norm_float32,
    silu_gated=layers.silu_gated_float32,
    gelu_gated=layers.gelu_gated_float32,
    rotate=rotary.rotate_float32,
    head_norm=rotary.head_norm_float32,
)
BFLOAT16: Final = Kernels(
    attend=attention.attend_bfloat16,
    rms_norm=layers.rms_norm_bfloat16,
    add_rms_norm=layers.add_rms_norm_bfloat16,
    silu_gated=layers.silu_gated_bfloat16,
    gelu_gated=layers.gelu_gated_bfloat16,
    rotate=rotary.rotate_bfloat16,
    head_norm=rotary.head_norm_bfloat16,
)


def of(dtype: torch.dtype) -> Kernels:
    """The kernels for tensors of this type; KeyError if there are none."""
    return _OF_DTYPE[dtype]


_OF_DTYPE: Final = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
