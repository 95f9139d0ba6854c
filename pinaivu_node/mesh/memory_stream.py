"""One connection of the memory network, and the streams on it."""

from __future__ import annotations

from collections.abc import Callable

import trio

from pinaivu_node.mesh.counters import Counters
from pinaivu_node.mesh.frame_queue import FrameQueue
from pinaivu_node.mesh.framing import check_frame_size
from pinaivu_node.mesh.mesh import MeshError, StreamEnded, StreamLost
from pinaivu_node.protocol.ids import PeerId

After = Callable[..., None]
"""after(delay, action, *arguments)"""


class Wire:
    """What carries frames between two peers, in order, as late as the latency says.

    Cut, it holds what is sent, as TCP does; mended, it delivers that at once.
    """

    def __init__(
        self,
        ends: tuple[PeerId, PeerId],
        after: After,
        latency: Callable[[PeerId, PeerId], float],
    ) -> None:
        self.ends = ends
        self.cuts = 0
        self.is_whole = True
        self._after = after
        self._latency = latency
        self._arrivals: dict[PeerId, float] = {}
        self._held: list[tuple[Callable[..., None], tuple[object, ...]]] = []
        self._streams: dict[MemoryStream, None] = {}  # ordered, for runs to be repeatable

    @property
    def streams(self) -> int:
        """Streams open, both ends of each counted once."""
        return len(self._streams) // 2

    def open_stream(
        self, opener: PeerId, acceptor: PeerId, opened: Counters, accepted: Counters
    ) -> tuple[MemoryStream, MemoryStream]:
        """The two ends of a new stream: the opener's and the acceptor's."""
        theirs = MemoryStream(self, me=opener, peer=acceptor, counters=opened)
        ours = MemoryStream(self, me=acceptor, peer=opener, counters=accepted)
        theirs.other, ours.other = ours, theirs
        self._streams[theirs] = self._streams[ours] = None
        return theirs, ours

    def close_stream(self, stream: MemoryStream) -> None:
        """Forget one end of a stream."""
        self._streams.pop(stream, None)

    def carry(self, sender: PeerId, action: Callable[..., None], *arguments: object) -> None:
        """Do this at the other end, after everything sent before it."""
        if not self.is_whole:
            self._held.append((action, arguments))
            return
        one, other = self.ends
        latency = self._latency(sender, other if sender == one else one)
        now = trio.current_time()
        arrival = max(now + latency, self._arrivals.get(sender, 0.0))
        self._arrivals[sender] = arrival
        self._after(arrival - now, self._arrive, action, arguments)

    def _arrive(self, action: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if self.is_whole:
            action(*arguments)
        else:
            self._held.append((action, arguments))

    def cut(self) -> None:
        """Carry nothing for now."""
        self.is_whole = False
        self.cuts += 1

    def mend(self) -> None:
        """Carry again, first what was held."""
        self.is_whole = True
        held, self._held = self._held, []
        for action, arguments in held:
            action(*arguments)

    def end(self) -> None:
        """Lose every stream; what has not arrived never will."""
        self.cut()
        self._held.clear()
        for stream in list(self._streams):
            stream.lose(StreamLost("the connection was lost"))


class MemoryStream:
    """A `FrameStream` with the same queues, limits and endings as one on a socket.

    A sender reserves room in the reader's queue, so that what is in flight is bounded too.
    """

    other: MemoryStream

    def __init__(self, wire: Wire, *, me: PeerId, peer: PeerId, counters: Counters) -> None:
        self._wire = wire
        self._me = me
        self._peer = peer
        self._counters = counters
        self.inbox = FrameQueue()
        self._no_more: MeshError | None = None
        self._ending = False
        self._is_open = True
        counters.open_streams += 1

    def attend(self, stall_limit: float, hang_up: Callable[[PeerId, str], None]) -> None:
        """Whom to tell of a peer that reads nothing for this long."""
        self._stall_limit = stall_limit
        self._hang_up = hang_up

    @property
    def peer(self) -> PeerId:
        """See `FrameStream.peer`."""
        return self._peer

    @property
    def is_ending(self) -> bool:
        """Whether END was said."""
        return self._ending

    async def send(self, frame: bytes) -> None:
        """See `FrameStream.send`."""
        check_frame_size(frame)
        self._check_sending()
        await self._reserve(len(frame))
        if self._no_more is not None:  # while we waited
            self.other.inbox.cancel_reservation(len(frame))
        self._check_sending()
        self._counters.frames_sent += 1
        self._wire.carry(self._me, self.other.inbox.put_reserved, frame)

    async def _reserve(self, size: int) -> None:
        try:
            with trio.fail_after(self._stall_limit):
                await self.other.inbox.reserve(size)
        except trio.TooSlowError:
            self._hang_up(self._peer, f"it read nothing for {self._stall_limit:g} s")
            raise StreamLost("the peer stopped reading") from None
        except MeshError as exc:
            raise StreamLost(f"the stream is over: {exc}") from None

    def _check_sending(self) -> None:
        if self._no_more is not None:
            raise type(self._no_more)(*self._no_more.args)

    async def receive(self) -> bytes:
        """See `FrameStream.receive`."""
        frame = await self.inbox.get()
        self._counters.frames_received += 1
        return frame

    async def end(self) -> None:
        """See `FrameStream.end`."""
        await trio.lowlevel.checkpoint()
        if self._no_more is None:
            self._no_more = StreamLost("END was said on this stream")
            self._ending = True
            ended = StreamEnded("the peer said END")
            self._wire.carry(self._me, self.other.hear_end, ended)

    def hear_end(self, error: StreamEnded) -> None:
        """The peer's END arrives."""
        self.inbox.close(error)
        if self._ending:
            self.close()
            self.other.close()

    def reset(self) -> None:
        """See `FrameStream.reset`."""
        if self._is_open:
            self.inbox.break_off(StreamLost("the stream was reset"))
            self._stop_sending(StreamLost("the stream was reset"))
            self._wire.carry(self._me, self.other.lose, StreamLost("the peer reset the stream"))

    def lose(self, error: MeshError) -> None:
        """No more will come; what has come can still be read."""
        self.inbox.lose(error)
        self._stop_sending(error)

    def _stop_sending(self, error: MeshError) -> None:
        if self._no_more is None:
            self._no_more = error
        self.close()

    def close(self) -> None:
        """Leave the wire: both sides have ended, or the stream is lost."""
        if self._is_open:
            self._is_open = False
            self._counters.open_streams -= 1
            self._wire.close_stream(self)
