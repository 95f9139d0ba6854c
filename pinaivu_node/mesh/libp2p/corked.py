"""Readers and writers of libp2p, made to need fewer turns through the event loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

_READ_BYTES: Final = 64 * 1024


class Buffered:
    """A connection or stream whose small reads are served from one large read of it.

    The stock handshake asks its socket for two bytes, then for a message; gossip asks its stream
    for one byte after another.  Each used to be a turn through the event loop of its own.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self._arrived = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes, empty at the end of the stream; cancellation loses none."""
        if not self._arrived:
            self._arrived = await self.raw.read(_READ_BYTES)
        n = len(self._arrived) if n is None else n
        data, self._arrived = self._arrived[:n], self._arrived[n:]
        return data

    def take_arrived(self) -> bytes:
        """What has arrived and was not read."""
        arrived, self._arrived = self._arrived, b""
        return arrived


class Corked(Buffered):
    """A connection whose writes leave together when an answer is waited for.

    `first` is called with this, once, before the first byte is read, to read what comes before
    that.  What was written after the last read does not leave by itself: see `take_unsent`.
    """

    def __init__(
        self, raw: Any, *, first: Callable[[Corked], Awaitable[None]] | None = None
    ) -> None:
        super().__init__(raw)
        self._first = first
        self._unsent = b""

    async def read(self, n: int | None = None) -> bytes:
        """See `Buffered.read`."""
        if self._first is not None:
            first, self._first = self._first, None
            await first(self)
        if self._unsent and not self._arrived:
            await self.raw.write(self.take_unsent())
        return await super().read(n)

    async def write(self, data: bytes) -> None:
        """Keep this, to leave with the next read that has to wait."""
        self._unsent += data

    def take_unsent(self) -> bytes:
        """What was written and has not left."""
        unsent, self._unsent = self._unsent, b""
        return unsent
