"""Who has which block of the KV cache: pure bookkeeping.

A block holds the keys and values of `size` positions.  A full block whose tokens are known is named
by a hash of them and of all tokens before; a sequence that begins with the same tokens shares it
instead of computing it.  The chain of hashes begins with the tenant, so nobody can find out by the
clock what another customer asked.

A block is free, in use by one or several sequences, or kept: used by none, but named, so that it
may be used again.  Kept blocks are given up least recently used first; of one sequence the last
ones first, since a block is worth nothing without those before it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A snapshot of a pool."""

    blocks: int
    in_use: int
    kept: int
    horizon_s: float
    """What was used within so many seconds is still here; infinite if nothing was given up."""


def root_name(tenant: bytes) -> bytes:
    """What a tenant's chains of names begin with."""
    return hashlib.blake2b(tenant, digest_size=16, person=b"pinaivu-kv/1").digest()


def next_name(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a block that holds these tokens after the block named `previous`."""
    content = array("q", tokens).tobytes()
    return hashlib.blake2b(content, digest_size=16, key=previous).digest()


class BlockPool:
    """The blocks of one KV cache."""

    def __init__(self, count: int, *, size: int) -> None:
        self.size = size
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._names: list[bytes | None] = [None] * count
        self._named: dict[bytes, int] = {}
        self._kept: OrderedDict[int, float] = OrderedDict()
        """Blocks in use by none, with the time of their last use; the oldest first."""
        self._given_up: float | None = None
        """Last use of the block that was given up last."""

    @property
    def available(self) -> int:
        """How many blocks could be had now."""
        return len(self._free) + len(self._kept)

    def known(self, names: Sequence[bytes]) -> int:
        """How many blocks from the first on are here."""
        for number, name in enumerate(names):
            if name not in self._named:
                return number
        return len(names)

    def share(self, names: Sequence[bytes]) -> list[int]:
        """Use the blocks of this name that are here, from the first on."""
        blocks = [self._named[name] for name in names[: self.known(names)]]
        for block in blocks:
            self._users[block] += 1
            self._kept.pop(block, None)
        return blocks

    def take(self, count: int) -> list[int] | None:
        """Use so many empty blocks; None, and nothing changed, if there are not so many."""
        if count > self.available:
            return None
        blocks = [self._free.pop() if self._free else self._give_up() for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
        return blocks

    def name(self, block: int, name: bytes) -> None:
        """Say what this block, full and computed, holds; the first block of a name is the one."""
        if self._names[block] is None and name not in self._named:
            self._names[block] = name
            self._named[name] = block

    def unname(self, blocks: Sequence[int]) -> None:
        """Nobody else may use what these hold."""
        for block in blocks:
            name = self._names[block]
            if name is not None:
                del self._named[name]
                self._names[block] = None

    def release(self, blocks: Sequence[int], *, now: float) -> None:
        """A sequence uses these, in order of position, no longer."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] > 0:
                continue
            if self._names[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = now

    def forget(self) -> None:
        """Name nothing any more, as if nothing had been computed; who uses a block goes on."""
        self._free += self._kept
        self._kept.clear()
        self._named.clear()
        self._names = [None] * self.count

    def statistics(self, *, now: float) -> PoolStatistics:
        """A snapshot."""
        return PoolStatistics(
            blocks=self.count,
            in_use=self.count - self.available,
            kept=len(self._kept),
            horizon_s=float("inf") if self._given_up is None else max(0.0, now - self._given_up),
        )

    def _give_up(self) -> int:
        block, self._given_up = self._kept.popitem(last=False)
        name = self._names[block]
        if name is not None:
            del self._named[name]
            self._names[block] = None
        return block
