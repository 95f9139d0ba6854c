"""Frames on one libp2p stream.

Reading and writing happen in two tasks of the mesh, and callers only touch queues, so that no
cancellation and no slowness of a caller reaches the connection.  What waits together goes out in
one write: frames, not bytes, are what costs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import trio

from pinaivu_node.mesh.counters import Counters
from pinaivu_node.mesh.frame_queue import FrameQueue
from pinaivu_node.mesh.framing import END, END_FRAME, EndOfFrames, FrameDecoder, encode_frame
from pinaivu_node.mesh.mesh import MeshError, StreamEnded, StreamLost
from pinaivu_node.mesh.peers import PeerBook
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId

logger = logging.getLogger(__name__)

_READ_BYTES: Final = 64 * 1024
_WRITE_BYTES: Final = 64 * 1024 - 64
"""With its header a Yamux frame of this size still fits one Noise record."""
_WINDOW_POLL: Final = 0.005
"""Seconds between looks at a closed send window; py-libp2p has no event for it opening."""


class Libp2pFrameStream:
    """A `FrameStream`; its owner runs `run` in a task."""

    def __init__(
        self,
        stream: Any,
        peer: PeerId,
        *,
        counters: Counters,
        book: PeerBook,
        stall_limit: float,
        drop: Callable[[PeerId, str], None],
    ) -> None:
        self._stream = stream
        self._muxed = stream.muxed_stream
        self._peer = peer
        self._counters = counters
        self._book = book
        self._stall_limit = stall_limit
        self._drop = drop
        self._inbox = FrameQueue()
        self._outbox = FrameQueue()
        self._decoder = FrameDecoder()
        self._held = 0
        self._ending = False
        self._scope = trio.CancelScope()
        self.closed = trio.Event()

    @property
    def peer(self) -> PeerId:
        """Who is at the other end."""
        return self._peer

    @property
    def is_ending(self) -> bool:
        """Whether END was said, so that what is queued should still go out."""
        return self._ending

    async def send(self, frame: bytes) -> None:
        """See `FrameStream.send`."""
        await self._outbox.put(encode_frame(frame))
        self._counters.frames_sent += 1

    async def receive(self) -> bytes:
        """See `FrameStream.receive`."""
        frame = await self._inbox.get()
        self._counters.frames_received += 1
        self._account()
        return frame

    async def end(self) -> None:
        """See `FrameStream.end`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._ending = True
        self._outbox.close(StreamLost("END was said on this stream"))

    def reset(self) -> None:
        """See `FrameStream.reset`."""
        self._break_off(StreamLost("the stream was reset"))

    async def run(self) -> None:
        """Move frames both ways until both sides have ended, or the stream is lost."""
        self._counters.open_streams += 1
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._guarded, self._read_frames)
                nursery.start_soon(self._guarded, self._write_frames)
        self._outbox.break_off(StreamLost("the stream is over"))
        self._counters.open_streams -= 1
        # Writes do not heed cancellation, so this neither tears a frame nor lasts for ever.
        with trio.CancelScope(shield=True):
            await self._dismiss(self._stream.reset)
        self.closed.set()
        self._account()

    async def _guarded(self, pump: Callable[[], Any]) -> None:
        try:
            await pump()
        except RemoteProtocolError as exc:
            self._drop(self._peer, str(exc))
            self._break_off(StreamLost(f"the peer broke the framing: {exc}"))
        except MeshError as exc:
            self._lose(exc)
        except Exception as exc:  # noqa: BLE001 - libp2p raises a dozen kinds, all of one meaning
            self._lose(StreamLost(f"the stream broke: {exc!r}"))

    def _lose(self, error: MeshError) -> None:
        """No more will come; what has come can still be read."""
        self._inbox.close(error)
        self._outbox.break_off(error)
        self._scope.cancel()

    def _break_off(self, error: MeshError) -> None:
        self._inbox.break_off(error)
        self._outbox.break_off(error)
        self._scope.cancel()
        self._account()

    async def _dismiss(self, farewell: Callable[[], Any]) -> None:
        try:
            await farewell()
        except Exception:
            logger.debug("a stream could not say goodbye", exc_info=True)

    # --- in ---------------------------------------------------------------------------------------

    async def _read_frames(self) -> None:
        while True:
            data = await self._muxed.read(_READ_BYTES)
            if not data:
                raise StreamLost("the bytes ended without an END frame")
            frames = self._decoder.feed_untrusted(data)
            if not self._account():
                raise RemoteProtocolError("it sent more than we hold for one peer")
            for frame in frames:
                if isinstance(frame, EndOfFrames):
                    assert frame is END  # noqa: S101 - for the reader
                    self._inbox.close(StreamEnded("the peer said END"))
                    return
                await self._inbox.put(frame)
            self._account()

    def _account(self) -> bool:
        """Tell the peer's budget what this stream holds; False when the peer is over it."""
        held = 0 if self.closed.is_set() else self._inbox.held + self._decoder.held
        growth, self._held = held - self._held, held
        if growth > 0:
            return self._book.hold(self._peer, growth)
        if growth < 0:
            self._book.release(self._peer, -growth)
        return True

    # --- out --------------------------------------------------------------------------------------

    async def _write_frames(self) -> None:
        while True:
            try:
                await self._outbox.wait_for_frames()
            except StreamLost:
                if not self._ending:
                    raise
                await self._write(END_FRAME)
                await self._stream.close()
                return
            await self._write(b"".join(self._outbox.take_nowait(_WRITE_BYTES)))

    async def _write(self, data: bytes) -> None:
        start = 0
        while start < len(data):
            room = min(await self._window(), _WRITE_BYTES)
            await self._muxed.write(data[start : start + room])
            start += room

    async def _window(self) -> int:
        """How much the peer lets us send; waits for it, which the stock write does for 5 s only."""
        deadline = trio.current_time() + self._stall_limit
        while self._muxed.send_window <= 0:
            if self._muxed.closed:
                raise StreamLost("the stream broke while its peer was not reading")
            if trio.current_time() > deadline:
                self._drop(self._peer, f"it read nothing for {self._stall_limit:g} s")
                raise StreamLost("the peer stopped reading")
            await trio.sleep(_WINDOW_POLL)
        window: int = self._muxed.send_window
        return window
