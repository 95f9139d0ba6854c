"""Raw memory for kernels: pointers from addresses, and numbers in the formats that tensors hold.

Kernels take addresses as integers, since unboxing arrays costs more than a small kernel's work, and
index through pointers, since numba's arrays check each index for its sign, which keeps LLVM from
vectorising.  The caller owns the memory and vouches for every shape.

Arithmetic is in float32 whatever the format.  `contract` lets a product and a sum become one fused
operation; nothing lets LLVM reorder sums, so a result does not depend on how a loop was unrolled.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, overload
from platformdirs import user_cache_path


def _digest_of_sources() -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# numba looks only at the file of the outermost function to see whether what it compiled is stale.
numba.config.CACHE_DIR = str(user_cache_path("pinaivu") / "kernels" / _digest_of_sources())

KERNEL: Final[dict[str, Any]] = {
    "fastmath": {"contract"},
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
}
"""How every kernel is compiled; cached on disk, so that only the first start on a machine waits."""


_variants: Final[Counter[str]] = Counter()


def variant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give one of several functions of the same `def` a name of its own; goes under `njit`.

    Numba calls machine code by the function's name and the types of its arguments.  Where these are
    the same, as in closures over addresses, code that two processes compiled and cached would go by
    one name in a third that loads both, and one of the two would run for the other.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    function.__qualname__ += f"_{_variants[name]}"
    _variants[name] += 1
    return function


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def pointer(context, address):
        signature = types.CPointer(element)(types.intp)

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return signature, generate

    return pointer


float32_at: Final = _pointer_to(types.float32)
bfloat16_at: Final = _pointer_to(types.uint16)
"""LLVM's own bfloat16 is no numba type: its bits are moved as integers."""
int64_at: Final = _pointer_to(types.int64)
uint8_at: Final = _pointer_to(types.uint8)
int8_at: Final = _pointer_to(types.int8)


def load(pointer, index):  # pragma: no cover - compiled
    """The number there, as float32."""
    raise NotImplementedError


def store(pointer, index, value):  # pragma: no cover - compiled
    """Put a float32 there, rounded to nearest even where the format is shorter."""
    raise NotImplementedError


@overload(load, inline="always")
def _load(pointer, index):
    if pointer.dtype == types.float32:
        return lambda pointer, index: pointer[index]
    return lambda pointer, index: np.uint32(np.uint32(pointer[index]) << np.uint32(16)).view(
        np.float32
    )


@overload(store, inline="always")
def _store(pointer, index, value):
    if pointer.dtype == types.float32:

        def store_float32(pointer, index, value):
            pointer[index] = value

        return store_float32

    def store_bfloat16(pointer, index, value):
        bits = np.float32(value).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd))
        pointer[index] = np.uint16(rounded >> np.uint32(16))

    return store_bfloat16
