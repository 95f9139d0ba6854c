"""All streams of one connection: the parser, whose turn it is to send, and the limits.  Pure.

Theory of operation.  What arrives is parsed as it comes: a payload is handed to its stream in the
pieces it arrives in, so that no more than eleven bytes of half a header are ever kept here.  What
goes out is made when it is asked for: first replies and control frames in the order they came up,
then the streams that have bytes and credit take turns.  So many small writes leave in one frame, a
bulk transfer delays nobody by more than its turn, and nothing is queued twice.

A stream's SYN comes before its bytes because control frames do; its FIN comes after them because it
is said when the last of them leaves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from pinaivu_node.mesh.yamux import frames
from pinaivu_node.mesh.yamux.events import Acknowledged, Event, GoneAway, Measured, Opened
from pinaivu_node.mesh.yamux.frames import ACK, FIN, HEADER, HEADER_BYTES, RST, SYN, Reason, pack
from pinaivu_node.mesh.yamux.states import Change
from pinaivu_node.mesh.yamux.stream import Stream
from pinaivu_node.mesh.yamux.windows import WindowBudget
from pinaivu_node.protocol.errors import LocalProtocolError, RemoteProtocolError

RECORD_BYTES: Final = 65_519
"""What one Noise message carries: 65,535 less its tag.  `data_to_send` fills one by default."""
_TURN_BYTES: Final = 16 * 1024
"""What a stream sends in one turn while others wait: 13 ms on a link of 10 Mbit/s."""
_LEAST_PIECE: Final = 1024
"""A record with less room left than this goes out as it is, not filled up with a sliver."""
_MOST_STREAMS: Final = 2**32 - 1
_ANY_FLAG: Final = SYN | ACK | FIN | RST


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may take of us."""

    inbound_streams: int = 256
    """Streams that the peer has open at once; one more is refused."""
    refusals: int = 256
    """Streams refused in a row before we take it for an attack."""
    open_backlog: int = 256
    """Streams of ours that the peer has not acknowledged; libp2p asks for no more than this."""
    queued_replies: int = 1024
    """Frames that we owe the peer.  Each is an answer to one of its own, so a peer that reads while
    it writes stays far below; 12 KiB."""
    window_budget: int = 32 << 20
    """All receive windows together, beyond which none grows."""
    largest_window: int = 8 << 20
    """One receive window: 80 MB/s at 100 ms."""


class Connection:
    """One side of a Yamux session."""

    def __init__(self, *, is_dialler: bool, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self.budget = WindowBudget(self._limits.window_budget, largest=self._limits.largest_window)
        self._streams: dict[int, Stream] = {}
        self._events: list[Event] = []
        self._control: list[bytes] = []
        self._round: deque[Stream] = deque()
        # Opening.
        self._parity = 1 if is_dialler else 0
        self._next = 1 if is_dialler else 2
        self._highest_theirs = 0
        self._inbound = 0
        self._refused = 0
        self._unacknowledged = 0
        self._we_leave = self._they_leave = False
        # Parsing.
        self._head = b""
        self._body_left = 0
        self._body_flags = 0
        self._body_stream: Stream | None = None
        # Keep alive.
        self._ping = 0
        self._pinged_at: float | None = None

    # --- for the owner ----------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        """How many are open."""
        return len(self._streams)

    @property
    def unread(self) -> int:
        """Bytes that arrived on open streams and were not read; adds them up."""
        return sum(stream.unread for stream in self._streams.values())

    @property
    def unsent(self) -> int:
        """Bytes of open streams that were not put into frames yet; adds them up."""
        return sum(stream.unsent for stream in self._streams.values())

    @property
    def round_trip(self) -> float | None:
        """Seconds, smoothed; None before the first ping came back."""
        return self.budget.round_trip

    @property
    def can_open(self) -> bool:
        """Whether a stream may be opened now; with room in the backlog again, later."""
        return not self.is_leaving and self._unacknowledged < self._limits.open_backlog

    @property
    def is_leaving(self) -> bool:
        """Whether either side said that it takes no more streams."""
        return self._we_leave or self._they_leave

    def open_stream(self) -> Stream:
        """A new stream of ours; LocalProtocolError unless `can_open`."""
        if not self.can_open or self._next > _MOST_STREAMS:
            raise LocalProtocolError("this connection takes no more streams now")
        stream = Stream(self, self._next, is_ours=True)
        self._next += 2
        self._unacknowledged += 1
        self._streams[stream.number] = stream
        self.say(pack(frames.WINDOW_UPDATE, SYN, stream.number, 0))
        return stream

    def ping(self, *, now: float) -> None:
        """Ask for a sign of life; when it comes `Measured` is told.  One at a time."""
        if self._pinged_at is None:
            self._ping = (self._ping + 1) & 0xFFFFFFFF
            self._pinged_at = now
            self.say(pack(frames.PING, SYN, frames.SESSION, self._ping))

    def go_away(self, reason: Reason = Reason.NORMAL) -> None:
        """Take no more streams, and open none.  Harmless when repeated."""
        if not self._we_leave:
            self._we_leave = True
            self.say(pack(frames.GO_AWAY, 0, frames.SESSION, reason))

    def reset_all(self) -> None:
        """Reset every stream: nothing that arrived is kept."""
        for stream in list(self._streams.values()):
            stream.reset()

    def lose(self) -> None:
        """The connection is gone: every stream ends, and says so."""
        self._we_leave = True
        self._control.clear()
        for stream in list(self._streams.values()):
            stream.change(Change.LOSE)

    @property
    def has_events(self) -> bool:
        """Whether `take_events` would return any."""
        return bool(self._events)

    def take_events(self) -> list[Event]:
        """What happened since this was last asked, in order."""
        events, self._events = self._events, []
        return events

    # --- out --------------------------------------------------------------------------------------

    @property
    def has_data_to_send(self) -> bool:
        """Whether `data_to_send` would return any."""
        return bool(self._control or self._round)

    def data_to_send(self, limit: int = RECORD_BYTES) -> bytes:
        """The next bytes for the peer: whole frames, at most `limit`; empty if there are none.

        They count as sent: whoever takes them must deliver them, in order, or lose the connection.
        """
        if len(self._control) * HEADER_BYTES > limit:
            some = limit // HEADER_BYTES
            control, self._control = self._control[:some], self._control[some:]
            return b"".join(control)
        out: list[bytes | memoryview] = []
        out += self._control
        self._control.clear()
        room = limit - len(out) * HEADER_BYTES - HEADER_BYTES  # a header's room for a FIN
        waiting = self._round
        while waiting and room >= _LEAST_PIECE:
            stream = waiting.popleft()
            if not stream.unsent or not stream.credit:  # broken since it was queued
                stream.is_queued = False
                continue
            turn = room - HEADER_BYTES
            room -= stream.emit(out, min(turn, _TURN_BYTES) if waiting else turn)
            if stream.unsent and stream.credit:
                waiting.append(stream)
            else:
                stream.is_queued = False
        return b"".join(out)

    # --- for streams ------------------------------------------------------------------------------

    def say(self, frame: bytes) -> None:
        """Queue a control frame of our own accord."""
        self._control.append(frame)

    def tell(self, event: Event) -> None:
        """Note what the owner should know."""
        self._events.append(event)

    def enqueue(self, stream: Stream) -> None:
        """Give this stream its turn."""
        stream.is_queued = True
        self._round.append(stream)

    def forget(self, stream: Stream) -> None:
        """Its number means nothing any more."""
        del self._streams[stream.number]
        stream.window.close()
        if not stream.is_ours:
            self._inbound -= 1
        elif not stream.acknowledged:
            self._acknowledge(stream)

    # --- in ---------------------------------------------------------------------------------------

    def receive_untrusted(self, data: bytes, *, now: float) -> None:
        """Take in what arrived.  After RemoteProtocolError nothing more may be handed in.

        The peer should then be told why: `go_away(Reason.PROTOCOL_ERROR)`.
        """
        self.budget.now = now
        if self._head:
            data = self._head + data
            self._head = b""
        size = len(data)
        at = min(self._body_left, size)
        if at:
            self._take_body(data[:at])
        streams = self._streams
        unpack = HEADER.unpack_from
        while size - at >= HEADER_BYTES:
            version, kind, flags, number, length = unpack(data, at)
            at += HEADER_BYTES
            if kind or version or flags:
                at = self._take_rare(data, at, (version, kind, flags, number, length))
                continue
            stream = streams.get(number)
            end = at + length
            if stream is None or end > size or not stream.is_receiving:
                at = self._begin_body(data, at, stream, (0, number, length))
                continue
            window = stream.window
            if length > window.allowance:
                raise _overrun(stream)
            window.allowance -= length
            if length:
                stream.accept(data[at:end])
            at = end
        if at < size:
            self._head = data[at:]

    def _take_rare(self, data: bytes, at: int, header: tuple[int, int, int, int, int]) -> int:
        """Anything but a plain DATA frame; returns where the next header begins."""
        version, kind, flags, number, length = header
        if version != frames.VERSION or flags > _ANY_FLAG:
            raise RemoteProtocolError(f"a Yamux header of version {version}, flags {flags}")
        match kind:
            case frames.DATA:
                return self._begin_body(data, at, self._addressed(flags, number), header[2:])
            case frames.WINDOW_UPDATE:
                self._on_window_update(flags, number, length)
            case frames.PING if number == frames.SESSION:
                self._on_ping(flags, length)
            case frames.GO_AWAY if number == frames.SESSION:
                if not self._they_leave:
                    self._they_leave = True
                    self.tell(GoneAway(length))
            case _:
                raise RemoteProtocolError(f"a Yamux frame of type {kind} for stream {number}")
        return at

    def _addressed(self, flags: int, number: int) -> Stream | None:
        """The stream that a frame is for, opened if it asks so; None if it is to be skipped."""
        stream = self._on_syn(number) if flags & SYN else self._streams.get(number)
        if stream is not None and flags & ACK and not stream.acknowledged:
            self._acknowledge(stream)
        if stream is not None and flags & RST:
            stream.change(Change.THEY_RESET)
            return None
        return stream

    def _begin_body(
        self, data: bytes, at: int, stream: Stream | None, header: tuple[int, int, int]
    ) -> int:
        """A DATA frame that is not plain or not whole; returns where the next header begins."""
        flags, number, length = header
        if stream is None:
            self._check_known(number)
        elif length:
            if not stream.is_receiving:
                raise RemoteProtocolError(f"data after FIN on stream {number}")
            if length > stream.window.allowance:
                raise _overrun(stream)
            stream.window.allowance -= length
        self._body_left, self._body_flags, self._body_stream = length, flags, stream
        end = min(at + length, len(data))
        self._take_body(data[at:end])
        return end

    def _take_body(self, piece: bytes) -> None:
        self._body_left -= len(piece)
        stream = self._body_stream
        # It may have been reset by us since the frame began.
        if piece and stream is not None and stream.is_receiving:
            stream.accept(piece)
        if not self._body_left:
            self._body_stream = None
            if stream is not None and self._body_flags & FIN:
                stream.change(Change.THEY_END)

    def _on_window_update(self, flags: int, number: int, length: int) -> None:
        stream = self._addressed(flags, number)
        if stream is None:
            self._check_known(number)
            return
        if length:
            stream.credit += length
            if stream.credit > frames.MAX_WINDOW:
                raise RemoteProtocolError(f"a window of {stream.credit} on stream {number}")
            if stream.unsent and not stream.is_queued:
                self.enqueue(stream)
        if flags & FIN:
            stream.change(Change.THEY_END)

    def _on_syn(self, number: int) -> Stream | None:
        if number in self._streams or number == frames.SESSION or number % 2 == self._parity:
            raise RemoteProtocolError(f"a SYN for stream {number}, which is not the peer's to open")
        self._highest_theirs = max(self._highest_theirs, number)
        if self._we_leave or self._inbound >= self._limits.inbound_streams:
            self._refused += 1
            if self._refused > self._limits.refusals:
                raise RemoteProtocolError(f"it opens more than {self._inbound} streams")
            self._reply(pack(frames.WINDOW_UPDATE, RST, number, 0))
            return None
        self._refused = 0
        stream = Stream(self, number, is_ours=False)
        self._streams[number] = stream
        self._inbound += 1
        self._reply(pack(frames.WINDOW_UPDATE, ACK, number, 0))
        self.tell(Opened(stream))
        return stream

    def _on_ping(self, flags: int, nonce: int) -> None:
        if flags & SYN:
            self._reply(pack(frames.PING, ACK, frames.SESSION, nonce))
        elif flags & ACK and nonce == self._ping and self._pinged_at is not None:
            measured = max(0.0, self.budget.now - self._pinged_at)
            self._pinged_at = None
            before = self.budget.round_trip
            self.budget.round_trip = measured if before is None else (before + measured) / 2
            self.tell(Measured(measured))

    def _acknowledge(self, stream: Stream) -> None:
        stream.acknowledged = True
        self._unacknowledged -= 1
        self.tell(Acknowledged(stream))

    def _check_known(self, number: int) -> None:
        """Refuse a frame for a stream that never was; one that is gone may have crossed our RST."""
        highest = self._next - 2 if number % 2 == self._parity else self._highest_theirs
        if number == frames.SESSION or number > highest:
            raise RemoteProtocolError(f"a frame for stream {number}, which never was")

    def _reply(self, frame: bytes) -> None:
        if len(self._control) >= self._limits.queued_replies:
            raise RemoteProtocolError("it asks for more than it reads")
        self._control.append(frame)


def _overrun(stream: Stream) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"it ignores flow control: more than the {stream.window.allowance} bytes "
        f"it may send on stream {stream.number}"
    )
