"""What the header of a GGUF file says, read in milliseconds and before anything is done with it.

The file is somebody's download: it may have broken off, be no GGUF at all, or one part of several.
Every length in it is compared with what is left of the file before it is believed.  Whether weights
can be converted is for the conversion to say, which takes a minute.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from math import prod
from pathlib import Path
from typing import Final

from pinaivu_node.models.errors import PullFailed

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
"""The first had other lengths, and its files are of models from before 2023's end."""
_MOST: Final = 1_000_000
"""Tensors, or metadata values, of a file; the largest models have some thousands."""
_MOST_SIDES: Final = 8
_ALIGNMENT: Final = 32
"""Bytes, where the file says nothing else."""
_STRING: Final = 8
_ARRAY: Final = 9
_WIDTHS: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value, by its type."""
_UNSIGNED: Final = {2: "<H", 4: "<I", 10: "<Q"}
_PACKED: Final = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""What a type of tensor is called, and how many weights lie in how many bytes; a type of tomorrow
is left to the conversion."""


class _Damaged(ValueError):
    """What the file says cannot be."""


def check_gguf(path: Path) -> tuple[str, ...]:
    """What formats its weights have, the most frequent first.

    PullFailed, saying what is wrong, unless this can be a whole model in GGUF.
    """
    try:
        return _formats(path)
    except _Damaged as exc:
        raise PullFailed(f"{path} cannot be converted: {exc}") from exc


def _formats(path: Path) -> tuple[str, ...]:
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise _Damaged("it is no GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data)
            needed = header.read()
            if len(data) < needed:
                raise _Damaged(
                    f"it broke off, {len(data):,} bytes of {needed:,} came: get it again"
                )
    return tuple(name for name, _ in header.formats.most_common())


class _Header:
    """Reads one header from its start to its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4
        self._alignment = _ALIGNMENT
        self._parts = 1
        self.formats: Counter[str] = Counter()
        """How many weights have which."""

    def read(self) -> int:
        """How many bytes the file must have; _Damaged if the header is none."""
        version = self._number("<I")
        if version not in _VERSIONS:
            raise _Damaged(f"it is GGUF in version {version}; known are 2 and 3")
        tensors, values = self._count("tensors"), self._count("values")
        for _ in range(values):
            self._value(self._string())
        if self._parts > 1:
            raise _Damaged(
                f"it is one of {self._parts} parts: join them with `llama-gguf-split --merge`"
            )
        ends = [self._tensor() for _ in range(tensors)]
        start = -(-self._at // self._alignment) * self._alignment
        return start + max(ends, default=0)

    def _value(self, key: bytes) -> None:
        kind = self._number("<I")
        if kind in _UNSIGNED and key in (b"general.alignment", b"split.count"):
            number = self._number(_UNSIGNED[kind])
            if key == b"split.count":
                self._parts = number
            elif number < 1 or number > 2**20:
                raise _Damaged("its header is damaged: get it again")
            else:
                self._alignment = number
        elif kind == _ARRAY:
            self._array()
        else:
            self._skip(kind, count=1)

    def _array(self) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        self._skip(kind, count=count)

    def _skip(self, kind: int, *, count: int) -> None:
        if kind == _STRING:
            if 8 * count > len(self._data) - self._at:
                raise self._broken()
            for _ in range(count):
                self._string()
        elif kind in _WIDTHS:
            self._bytes(_WIDTHS[kind] * count)
        else:  # arrays of arrays are in no file
            raise _Damaged("its header is damaged: get it again")

    def _tensor(self) -> int:
        """Where its data end, counted from where all data begin."""
        self._string()
        sides = self._number("<I")
        if sides > _MOST_SIDES:
            raise _Damaged("its header is damaged: get it again")
        weights = prod(self._number("<Q") for _ in range(sides))
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in _PACKED:
            return offset
        name, block, size = _PACKED[kind]
        self.formats[name] += weights
        return offset + weights // block * size

    def _count(self, what: str) -> int:
        count = self._number("<Q")
        if count > _MOST:
            raise _Damaged(f"it speaks of {count:,} {what}: it is damaged, get it again")
        return count

    def _string(self) -> bytes:
        return self._bytes(self._number("<Q"))

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._bytes(struct.calcsize(form)))[0])

    def _bytes(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise self._broken()
        taken = self._data[self._at : end]
        self._at = end
        return taken

    @staticmethod
    def _broken() -> _Damaged:
        return _Damaged("it broke off within its header: get it again")
