"""A scheduled step as plain numbers: what a model is given, here or in another process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pinaivu_node.engine.batching.scheduler import Chunk

_CHUNK_COLUMNS: Final = 4


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens of all chunks end to end, and whose they are."""

    tokens: list[int]
    last: list[int]
    """Which of the tokens are to have logits."""
    chunks: list[tuple[int, int, int, int]]
    """First token of it, tokens, start position, table row."""
    tables: list[list[int]]
    """Each sequence's pages, in order of position, padded to the longest."""

    @property
    def positions(self) -> list[int]:
        """Of each token."""
        return [
            place for _, count, start, _ in self.chunks for place in range(start, start + count)
        ]

    @property
    def is_decoding(self) -> bool:
        """Whether it is one token of each of its sequences, and its logits."""
        return len(self.tokens) == len(self.chunks) == len(self.last)

    def pack(self) -> bytes:
        """For `unpack` in another process of ours on this machine."""
        width = len(self.tables[0])
        sizes = [len(self.tokens), len(self.last), len(self.chunks), len(self.tables), width]
        tables = [page for table in self.tables for page in table]
        chunks = [number for chunk in self.chunks for number in chunk]
        return np.array([*sizes, *self.tokens, *self.last, *chunks, *tables], np.int64).tobytes()

    @classmethod
    def unpack(cls, packed: bytes) -> Step:
        """What `pack` was of."""
        numbers = np.frombuffer(packed, np.int64)
        tokens, last, chunks, sequences, width = numbers[:5].tolist()
        sizes = [5, tokens, last, chunks * _CHUNK_COLUMNS, sequences * width]
        _, *parts = np.split(numbers, np.cumsum(sizes)[:-1])
        return cls(
            parts[0].tolist(),
            parts[1].tolist(),
            [(a, b, c, d) for a, b, c, d in parts[2].reshape(chunks, _CHUNK_COLUMNS).tolist()],
            parts[3].reshape(sequences, width).tolist(),
        )


def step_of(chunks: Sequence[Chunk]) -> Step:
    """The step that computes these chunks."""
    tokens: list[int] = []
    last: list[int] = []
    rows: list[tuple[int, int, int, int]] = []
    for number, chunk in enumerate(chunks):
        added = chunk.tokens
        rows.append((len(tokens), len(added), chunk.start, number))
        tokens += added
        last += range(len(tokens) - chunk.rows, len(tokens))
    longest = max(len(chunk.sequence.blocks) for chunk in chunks)
    tables = [
        chunk.sequence.blocks + [0] * (longest - len(chunk.sequence.blocks)) for chunk in chunks
    ]
    return Step(tokens, last, rows, tables)
