"""One stream: bytes that wait to go out, and bytes that came in and were not read.  Pure.

Both are kept as the pieces they came in, and copied as seldom as possible: once into the frame they
leave in, and once out of the record they arrived in.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from pinaivu_node.mesh.yamux import frames
from pinaivu_node.mesh.yamux.events import Closed, Readable, Writable
from pinaivu_node.mesh.yamux.frames import HEADER_BYTES, pack
from pinaivu_node.mesh.yamux.states import FINAL, Change, State, after
from pinaivu_node.mesh.yamux.windows import ReceiveWindow
from pinaivu_node.protocol.errors import LocalProtocolError

if TYPE_CHECKING:
    from pinaivu_node.mesh.yamux.connection import Connection

_FEW_PIECES: Final = 64
_SMALL_PIECE: Final = 512
"""A piece costs about 60 bytes beside its own.  More than a few that are smaller than this on
average are joined, so that a peer that sends byte by byte fills its window and not 40 of them."""


class Stream:
    """Made by `Connection.open_stream`, or told of in `Opened`.  Owned by its connection."""

    __slots__ = (
        "_connection",
        "_ending",
        "_incoming",
        "_outgoing",
        "_readable",
        "_wants_room",
        "acknowledged",
        "complete",
        "credit",
        "is_ours",
        "is_queued",
        "low_water",
        "number",
        "offset",
        "owner",
        "sent",
        "state",
        "unread",
        "unsent",
        "window",
    )

    def __init__(self, connection: Connection, number: int, *, is_ours: bool) -> None:
        self._connection = connection
        self._incoming: deque[bytes] = deque()
        self._outgoing: deque[bytes | memoryview] = deque()
        self._readable = Readable(self)  # one object for all the times it is told
        self._ending = False
        self._wants_room = False
        self.number = number
        self.owner: Any = None
        """Whatever the owner of the connection hangs here, to find its own half by."""
        self.is_ours = is_ours
        self.acknowledged = not is_ours
        self.state = State.OPEN
        self.complete = False
        """Whether the peer said FIN, so that what has arrived is all that it sent."""
        self.unread = 0
        self.offset = 0
        """How much of the first piece was read."""
        self.window = ReceiveWindow(connection.budget)
        self.unsent = 0
        self.sent = 0
        """Bytes put into frames so far."""
        self.credit = frames.INITIAL_WINDOW
        """What the peer lets us send."""
        self.low_water = 0
        self.is_queued = False
        """Whether the stream waits for its turn to send."""

    # --- in ---------------------------------------------------------------------------------------

    @property
    def is_receiving(self) -> bool:
        """Whether the peer may still send on this stream."""
        return self.state is State.OPEN or self.state is State.WE_ENDED

    def read(self, limit: int | None = None) -> bytes:
        """What has arrived, at most `limit` bytes of it, mostly less; empty when there is nothing.

        What is read is given back to the peer's window, now or with a later read.
        """
        incoming = self._incoming
        if not incoming:
            return b""
        if len(incoming) == 1 and not self.offset and (limit is None or self.unread <= limit):
            data = incoming.popleft()
        else:
            data = self._read_within(self.unread if limit is None else limit)
        size = len(data)
        self.unread -= size
        if self.state is State.OPEN or self.state is State.WE_ENDED:
            given = self.window.read(size)
            if given:
                self._connection.say(pack(frames.WINDOW_UPDATE, 0, self.number, given))
        return data

    def _read_within(self, limit: int) -> bytes:
        """Whole pieces up to the limit, which is no reason to cut one but the first."""
        incoming = self._incoming
        pieces: list[bytes] = []
        while incoming and limit:
            first = incoming[0]
            piece = first[self.offset : self.offset + limit] if self.offset else first
            if len(piece) > limit:
                if pieces:
                    break
                piece = first[:limit]
            pieces.append(piece)
            limit -= len(piece)
            self.offset += len(piece)
            if self.offset == len(first):
                incoming.popleft()
                self.offset = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def accept(self, piece: bytes) -> None:
        """The parser's: bytes within the window have arrived."""
        incoming = self._incoming
        incoming.append(piece)
        if not self.unread:
            self._connection.tell(self._readable)
        self.unread += len(piece)
        if len(incoming) > _FEW_PIECES and self.unread < _SMALL_PIECE * len(incoming):
            incoming.append(self._read_within(self.unread))

    # --- out --------------------------------------------------------------------------------------

    @property
    def can_send(self) -> bool:
        """Whether bytes may be sent: neither ended nor broken."""
        return not self._ending and (self.state is State.OPEN or self.state is State.THEY_ENDED)

    def send(self, data: bytes) -> None:
        """Queue bytes; all of them leave in time, or none after a break.

        How much may be queued is the caller's to bound: see `unsent` and `want_room`.
        """
        if not self.can_send:
            raise LocalProtocolError(f"stream {self.number} takes no bytes: {self.state.value}")
        if data:
            self._outgoing.append(data)
            self.unsent += len(data)
            if not self.is_queued and self.credit:
                self._connection.enqueue(self)

    def want_room(self, low_water: int) -> None:
        """Tell `Writable` when no more than `low_water` bytes are unsent."""
        self._wants_room = True
        self.low_water = low_water

    def end(self) -> None:
        """Say FIN after what is queued.  Harmless when repeated, or after a break."""
        if self.can_send:
            self._ending = True
            if not self.unsent:
                self._say_end()

    def _say_end(self) -> None:
        self._connection.say(pack(frames.WINDOW_UPDATE, frames.FIN, self.number, 0))
        self.change(Change.WE_END)

    def emit(self, out: list[bytes | memoryview], room: int) -> int:
        """The connection's: put one DATA frame of at most `room` bytes payload into `out`.

        Returns the bytes it takes.  There is something unsent, and credit for it.
        """
        size = min(self.unsent, self.credit, room)
        out.append(frames.HEADER.pack(0, frames.DATA, 0, self.number, size))
        if size == self.unsent:
            out.extend(self._outgoing)
            self._outgoing.clear()
        else:
            self._split(out, size)
        self.unsent -= size
        self.credit -= size
        self.sent += size
        if self._ending and not self.unsent:
            # A frame of its own: Go's implementation heeds a FIN before the data it came with.
            out.append(pack(frames.WINDOW_UPDATE, frames.FIN, self.number, 0))
            size += HEADER_BYTES
            self.change(Change.WE_END)
        if self._wants_room and self.unsent <= self.low_water:
            self._wants_room = False
            self._connection.tell(Writable(self))
        return HEADER_BYTES + size

    def _split(self, out: list[bytes | memoryview], size: int) -> None:
        outgoing = self._outgoing
        while size:
            piece = outgoing.popleft()
            if len(piece) > size:
                view = memoryview(piece)
                out.append(view[:size])
                outgoing.appendleft(view[size:])
                return
            out.append(piece)
            size -= len(piece)

    # --- both -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Say RST and forget all bytes, both ways.  Changes nothing when the stream is over."""
        if self.change(Change.WE_RESET):
            self._connection.say(pack(frames.WINDOW_UPDATE, frames.RST, self.number, 0))
            self._incoming.clear()
            self.unread = self.offset = 0

    def change(self, change: Change) -> bool:
        """Go to the next state, if the table has one; False if not."""
        state = after(self.state, change)
        if state is None:
            return False
        self.state = state
        if change is Change.THEY_END:
            self.complete = True
        if change is not Change.WE_END and not self.unread:
            self._connection.tell(self._readable)
        if state in FINAL:
            self._finish()
        return True

    def _finish(self) -> None:
        self._outgoing.clear()
        self.unsent = 0
        self._connection.forget(self)
        if self._wants_room:
            self._wants_room = False
            self._connection.tell(Writable(self))
        self._connection.tell(Closed(self))
