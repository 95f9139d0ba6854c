"""Rows times a weight matrix in int8, by the matrix unit of recent x86 processors (AMX).

As `amx.py`, but one instruction takes 64 inputs, four to a word (TDPBSSD), and a sum is an integer.
A row of inputs is two rows of int8 (see `integer.py`), so a tile of rows is half as many of them.

Weights lie in panels of 16 outputs, [panel, four inputs, output, 4].
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from pinaivu_node.engine.kernels import amx
from pinaivu_node.engine.kernels.integer import split_rows_bfloat16, split_rows_float32
from pinaivu_node.engine.kernels.linear import BFLOAT16, FLOAT32
from pinaivu_node.engine.kernels.memory import KERNEL, float32_at, uint8_at
