"""Choices out of bytes, so that a fuzzer that varies bytes varies what is done."""

from __future__ import annotations


class Dice:
    """Bytes are taken from the front and choices from the back: one change moves only one of them.

    When nothing is left, every choice is the lowest and all bytes are empty.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._start = 0
        self._end = len(data)

    @property
    def left(self) -> int:
        """Bytes that were not used yet."""
        return self._end - self._start

    def number(self, low: int, high: int) -> int:
        """A number of at most 256 in a row, both ends included."""
        if not self.left:
            return low
        self._end -= 1
        return low + self._data[self._end] % (high - low + 1)

    def take(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        size = min(size, self.left)
        self._start += size
        return self._data[self._start - size : self._start]
