"""Frames on one libp2p stream.

Callers touch our muxed stream itself, with no task or queue between: whatever they do to it is
done wholly or not at all, so no cancellation and no slowness of theirs reaches the connection.
What many callers send in one turn of the event loop leaves in one write.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import trio
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError

from pinaivu_node.mesh.counters import Counters
from pinaivu_node.mesh.framing import END_FRAME, EndOfFrames, FrameDecoder, frame_head
from pinaivu_node.mesh.libp2p.muxed_stream import MuxedStream
from pinaivu_node.mesh.mesh import MeshError, StreamEnded, StreamLost
from pinaivu_node.mesh.peers import PeerBook
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId

_READ_BYTES: Final = 64 * 1024
"""Decoded at once, and so what a stream holds in frames that nobody has asked for yet."""
_LONG_FRAME: Final = 4096
"""A frame of this size is not copied to be sent behind its head."""


class Libp2pFrameStream:
    """A `FrameStream`.  `closed` is set when neither side may send any more; `frames` counts."""

    def __init__(
        self,
        stream: Any,
        peer: PeerId,
        *,
        counters: Counters,
        book: PeerBook,
        drop: Callable[[PeerId, str], None],
    ) -> None:
        self.libp2p_stream = stream
        self._muxed: MuxedStream = stream.muxed_stream
        self._peer = peer
        self._counters = counters
        self._book = book
        self._drop = drop
        self._decoder = FrameDecoder()
        self._frames: deque[bytes] = deque()
        self._held = 0
        self._ended = False
        self._ending = False
        self._broken: MeshError | None = None
        self._sent_before = 0
        self.frames = 0
        self._moved_at = trio.current_time()
        self.closed = trio.Event()
        counters.open_streams += 1

    @property
    def peer(self) -> PeerId:
        """Who is at the other end."""
        return self._peer

    @property
    def is_ending(self) -> bool:
        """Whether END was said, so that what is queued should still go out."""
        return self._ending

    def attend(self, when_closed: Callable[[Libp2pFrameStream], None]) -> None:
        """Call this once the stream is closed, which may be at once."""

        def close() -> None:
            self.closed.set()
            self._counters.open_streams -= 1
            self._hold(0)
            when_closed(self)

        if self._muxed.is_closed:
            close()
        else:
            self._muxed.when_closed = close

    async def send(self, frame: bytes) -> None:
        """See `FrameStream.send`."""
        try:
            if len(frame) < _LONG_FRAME:
                await self._muxed.write(frame_head(frame) + frame)
            else:
                await self._muxed.write(frame_head(frame), frame)
        except MuxedStreamError as exc:
            raise self._lost(exc) from exc
        self.frames += 1
        self._counters.frames_sent += 1

    async def receive(self) -> bytes:
        """See `FrameStream.receive`."""
        if self._frames:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._frames:
            if self._broken is not None:
                raise type(self._broken)(*self._broken.args)
            if self._ended:
                raise StreamEnded("the peer said END")
            try:
                data = await self._muxed.read(_READ_BYTES)
            except MuxedStreamEOF as exc:
                raise StreamLost("the bytes ended without an END frame") from exc
            except MuxedStreamError as exc:
                raise self._lost(exc) from exc
            self._take_in(data)
        self.frames += 1
        self._counters.frames_received += 1
        return self._frames.popleft()

    async def end(self) -> None:
        """See `FrameStream.end`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._ending:
            self._ending = True
            if self._muxed.core.can_send:
                self._muxed.write_nowait(END_FRAME)
                self._muxed.end()

    def reset(self) -> None:
        """See `FrameStream.reset`."""
        self._break_off(StreamLost("the stream was reset"))

    def is_stalled(self, *, now: float, limit: float) -> bool:
        """Whether bytes of ours have waited this long and none could leave.

        To be asked several times within the limit; it goes by what it saw the last time.
        """
        core = self._muxed.core
        if not core.unsent or core.sent != self._sent_before:
            self._sent_before = core.sent
            self._moved_at = now
        return now - self._moved_at > limit

    def _take_in(self, data: bytes) -> None:
        try:
            frames = self._decoder.feed_untrusted(data)
        except RemoteProtocolError as exc:
            self._accuse(f"it broke the framing: {exc}")
            return
        for frame in frames:
            if isinstance(frame, EndOfFrames):
                self._ended = True
            else:
                self._frames.append(frame)
        if not self._hold(self._decoder.held):
            self._accuse("it sent more than we hold for one peer")

    def _accuse(self, reason: str) -> None:
        self._drop(self._peer, reason)
        self._break_off(StreamLost(f"the peer was dropped: {reason}"))

    def _hold(self, held: int) -> bool:
        """Tell the peer's budget of the half frame we hold; False when the peer is over it."""
        growth, self._held = held - self._held, held
        if growth > 0:
            return self._book.hold(self._peer, growth)
        if growth < 0:
            self._book.release(self._peer, -growth)
        return True

    def _break_off(self, error: MeshError) -> None:
        self._broken = error
        self._frames.clear()
        self._muxed.abandon()

    def _lost(self, exc: MuxedStreamError) -> MeshError:
        if self._broken is not None:
            return type(self._broken)(*self._broken.args)
        if self._ending:
            return StreamLost("END was said on this stream")
        return StreamLost(f"the stream broke: {exc}")
