"""One stream of our Yamux, in the shape that py-libp2p wants a muxed stream to have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Self

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import (
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)

from pinaivu_node.mesh.yamux.states import FINAL
from pinaivu_node.mesh.yamux.stream import Stream

if TYPE_CHECKING:
    from pinaivu_node.mesh.libp2p.muxer import MuxedConnection

HIGH_WATER: Final = 256 * 1024
"""What one stream may have unsent: as much again as the peer's first window.  A longer write
enters when nothing is unsent, whole."""
_EAGER: Final = 128 * 1024
"""With so much unsent there is nothing to gain from waiting for more."""


class MuxedStream(IMuxedStream):  # type: ignore[misc] # untyped base
    """Bytes both ways.  One task may read, any number write; all waits may be cancelled."""

    def __init__(self, connection: MuxedConnection, core: Stream) -> None:
        self.muxed_conn = connection
        self.core = core
        core.owner = self
        self._reader: trio.lowlevel.Task | None = None
        self._writers = trio.lowlevel.ParkingLot()
        self._written = 0
        self.when_closed: Callable[[], None] | None = None
        """Called once when neither side may send any more."""
        self._waiting_for_end = trio.lowlevel.ParkingLot()

    @property
    def stream_id(self) -> int:
        """Its number on this connection."""
        return self.core.number

    async def read(self, n: int | None = None) -> bytes:
        """What has arrived, at most `n` bytes; waits for some.

        MuxedStreamEOF after the peer's FIN; MuxedStreamReset after a reset by either side, or when
        the connection is lost, once everything that had arrived was read.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        core = self.core
        while not core.unread:
            if core.complete:
                raise MuxedStreamEOF(f"stream {core.number} has ended")
            if not core.is_receiving:
                raise MuxedStreamReset(f"stream {core.number}: {core.state.value}")
            if self._reader is not None:
                raise trio.BusyResourceError("another task reads this stream")
            self._reader = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._stop_waiting)
        data = core.read(None if n is None or n < 0 else n)
        self.muxed_conn.touch_if_needed()
        return data

    def _stop_waiting(self, _raise_cancel: Any) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def write(self, data: bytes | bytearray, more: bytes = b"") -> None:
        """Queue all of both, after waiting for room; a write that is cancelled queued nothing.

        MuxedStreamClosed after `close`; MuxedStreamReset when the stream broke.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        core = self.core
        size = len(data) + len(more)
        while core.can_send and core.unsent and core.unsent + size > HIGH_WATER:
            core.want_room(max(0, HIGH_WATER - size))
            await self._writers.park()
        self.write_nowait(data, more)
        self._written += size
        if self._written >= _EAGER:
            # Others have their turn, though the socket and the window take all that one task has.
            self._written = 0
            await trio.lowlevel.cancel_shielded_checkpoint()

    def write_nowait(self, data: bytes | bytearray, more: bytes = b"") -> None:
        """Queue all of both, whatever is queued already; raises as `write` does."""
        core = self.core
        if not core.can_send:
            if core.state in FINAL and not core.complete:
                raise MuxedStreamReset(f"stream {core.number}: {core.state.value}")
            raise MuxedStreamClosed(f"stream {core.number} is closed for writing")
        core.send(data if isinstance(data, bytes) else bytes(data))
        if more:
            core.send(more)
        if core.unsent >= _EAGER:
            self.muxed_conn.flush()
        else:
            self.muxed_conn.touch()

    async def close(self) -> None:
        """End our direction, after what is queued; reading goes on."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.end()

    close_write = close

    def end(self) -> None:
        """What `close` does, at once."""
        self.core.end()
        self._writers.unpark_all()
        self.muxed_conn.settle()

    async def reset(self) -> None:
        """Break off both directions, and forget what is queued."""
        self.abandon()
        await trio.lowlevel.checkpoint_if_cancelled()

    def abandon(self) -> None:
        """What `reset` does, at once."""
        self.core.reset()
        self.muxed_conn.settle()

    @property
    def is_closed(self) -> bool:
        """Whether neither side may send any more."""
        return self.core.state in FINAL

    async def wait_closed(self) -> None:
        """Return when neither side may send any more."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.is_closed:
            await self._waiting_for_end.park()

    def set_deadline(self, ttl: int) -> bool:
        """Trio's cancel scopes do this better, and on this stream harm nothing."""
        raise NotImplementedError

    def get_remote_address(self) -> Any:
        """Host and port of the peer."""
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> Self:
        return self

    # --- the connection's -------------------------------------------------------------------------

    def on_readable(self) -> None:
        """There are bytes, an end or a break to be learnt of."""
        if self._reader is not None:
            task, self._reader = self._reader, None
            trio.lowlevel.reschedule(task)

    def on_writable(self) -> None:
        """There is room, or nothing can be written any more."""
        self._writers.unpark_all()

    def on_closed(self) -> None:
        """The stream is in a final state."""
        self._waiting_for_end.unpark_all()
        if self.when_closed is not None:
            when_closed, self.when_closed = self.when_closed, None
            when_closed()
