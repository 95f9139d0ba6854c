"""What carries the bytes of one connection: a TCP socket, or any stream that libp2p has.

A socket is read and written past trio's stream: one system call for all that has arrived, into one
buffer that all connections share, and one for all that is to go, with no task switch before it.
What passes through other layers of libp2p, like a relayed circuit, is read and written as it wants.
"""

from __future__ import annotations

import select
from typing import Any, Final, Protocol

import trio

_READ_BYTES: Final = 256 * 1024
"""Four Noise messages of full size; a quarter of a core's second-level cache."""
_BURST_BYTES: Final = 128 * 1024
"""Sent without asking whether the peer keeps up.  The kernel calls a socket writable again when
less than 16 KiB have not left the machine (TCP_NOTSENT_LOWAT, which trio sets), so that on a slow
link a token or a ping waits behind this much, and not behind megabytes of send buffer."""

_shared_buffer: trio.lowlevel.RunVar[memoryview] = trio.lowlevel.RunVar("shared_buffer")


class Channel(Protocol):
    """Bytes both ways.  One task reads; sending is one at a time.  Errors are OSError or trio's."""

    async def receive(self) -> bytes | memoryview:
        """What has arrived, empty at the end; to be used up before the next checkpoint."""
        ...

    def send_nowait(self, data: memoryview) -> int:
        """Send without waiting; returns how much was taken, which may be nothing."""
        ...

    async def send(self, data: memoryview) -> int:
        """Wait until something can be sent, and send it; returns how much was taken."""
        ...

    async def close(self) -> None:
        """Break off: whoever waits here gets an error."""
        ...


class SocketChannel:
    """A TCP socket."""

    def __init__(self, raw: Any, sock: Any) -> None:
        self._raw = raw
        self._socket = sock
        self._burst = _BURST_BYTES
        self._poll = select.poll()
        self._poll.register(sock, select.POLLOUT)
        try:
            self._buffer = _shared_buffer.get()
        except LookupError:
            self._buffer = memoryview(bytearray(_READ_BYTES))
            _shared_buffer.set(self._buffer)

    async def receive(self) -> memoryview:
        """See `Channel.receive`."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._buffer[: self._socket.recv_into(self._buffer)]
            except (BlockingIOError, InterruptedError):
                continue

    def send_nowait(self, data: memoryview) -> int:
        """See `Channel.send_nowait`."""
        if self._burst <= 0:
            if not self._poll.poll(0):
                return 0
            self._burst = _BURST_BYTES
        try:
            sent: int = self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        self._burst = self._burst - sent if sent == len(data) else 0
        return sent

    async def send(self, data: memoryview) -> int:
        """See `Channel.send`."""
        await trio.lowlevel.wait_writable(self._socket)
        self._burst = _BURST_BYTES
        return self.send_nowait(data)

    async def close(self) -> None:
        """See `Channel.close`."""
        await self._raw.close()


class LayeredChannel:
    """A connection of libp2p that has no socket of its own."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    async def receive(self) -> bytes:
        """See `Channel.receive`."""
        data: bytes = await self._raw.read(_READ_BYTES)
        return data

    def send_nowait(self, data: memoryview) -> int:  # noqa: ARG002 - the interface's
        """See `Channel.send_nowait`."""
        return 0

    async def send(self, data: memoryview) -> int:
        """See `Channel.send`."""
        await self._raw.write(bytes(data))
        return len(data)

    async def close(self) -> None:
        """See `Channel.close`."""
        await self._raw.close()


def channel_of(raw: Any) -> Channel:
    """The best channel for a raw connection of libp2p."""
    stream = getattr(getattr(raw, "stream", None), "stream", None)
    if isinstance(stream, trio.SocketStream):
        return SocketChannel(raw, stream.socket._sock)  # type: ignore[attr-defined] # noqa: SLF001
    return LayeredChannel(raw)
