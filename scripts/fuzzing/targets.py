"""What is fuzzed.  A target fails when it raises, or keeps more than it may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pinaivu_node.mesh.framing import FrameDecoder
from pinaivu_node.mesh.mesh import MAX_FRAME_BYTES
from pinaivu_node.mesh.noise import Opener, Sealer
from pinaivu_node.mesh.yamux import events as told
from pinaivu_node.mesh.yamux.connection import Connection, Limits
from pinaivu_node.mesh.yamux.frames import INITIAL_WINDOW, pack
from pinaivu_node.mesh.yamux.stream import Stream
from pinaivu_node.protocol.errors import RemoteProtocolError
from scripts.fuzzing.dice import Dice

LIMITS: Final = Limits(inbound_streams=4, refusals=8, queued_replies=16, window_budget=1 << 20)
OURS: Final = 2
MAX_OPEN: Final = (LIMITS.inbound_streams + OURS) * INITIAL_WINDOW
"""The windows of all streams that are open.  None grows: that takes more bytes than are fed."""


class Broken(Exception):
    """What must always hold did not."""


def yamux(data: bytes) -> None:
    """One side with streams of its own, fed in pieces, its owner reading, ending and resetting."""
    dice = Dice(data)
    connection = Connection(is_dialler=bool(dice.number(0, 1)), limits=LIMITS)
    streams = [connection.open_stream() for _ in range(OURS)]
    streams[0].send(bytes(300_000))
    now = 0.0
    try:
        while dice.left:
            now += 0.01
            connection.receive_untrusted(_wire(dice), now=now)
            events = connection.take_events()
            streams += [event.stream for event in events if isinstance(event, told.Opened)]
            _act(dice, connection, streams[dice.number(0, min(len(streams), 256) - 1)], now)
            still_open = list(connection._streams.values())  # noqa: SLF001
            _hold(sum(stream.unread for stream in still_open) <= MAX_OPEN, "windows hold")
            _hold(len(still_open) <= LIMITS.inbound_streams + OURS, "streams are counted")
    except RemoteProtocolError:
        pass
    connection.lose()
    _hold(connection.budget.total == 0, "every window is given back")
    _hold(connection.streams == 0, "every stream ends")


def _wire(dice: Dice) -> bytes:
    """Bytes as they are, or with the header of a frame before them."""
    body = dice.take(dice.number(0, 63))
    if dice.number(0, 2) == 0:
        return body
    kind, flags, number = dice.number(0, 4), dice.number(0, 16), dice.number(0, 9)
    return pack(kind, flags, number, len(body) + (dice.number(0, 7) == 1)) + body


def _act(dice: Dice, connection: Connection, stream: Stream, now: float) -> None:
    """One thing that an owner may do, at any time."""
    match dice.number(0, 8):
        case 0:
            stream.reset()
        case 1:
            stream.end()
        case 2 | 3:
            _hold(len(stream.read(100)) <= 100, "a read heeds its limit")
        case 4:
            connection.ping(now=now)
        case 5 if stream.can_send:
            stream.send(b"more")
        case 6:
            connection.go_away()
        case _:
            _hold(len(connection.data_to_send(4096)) <= 4096, "a record heeds its limit")


def noise(data: bytes) -> None:
    """Sealed messages that someone without the key cuts, changes, repeats and leaves out."""
    dice = Dice(data)
    sealer, opener = Sealer(bytes(32)), Opener(bytes(32))
    said: list[bytes] = []
    heard: list[bytes] = []
    try:
        while dice.left:
            said.append(dice.take(dice.number(0, 40)))
            wire = bytes(sealer.seal(said[-1:]))
            match dice.number(0, 9):
                case 0:
                    wire = dice.take(20)
                case 1:
                    wire += wire[-dice.number(1, 20) :]
                case 2:
                    wire = wire[dice.number(1, 20) :]
                case _:
                    pass
            cut = dice.number(0, len(wire))
            for piece in (wire[:cut], wire[cut:]):
                heard += opener.open_untrusted(piece)
            _hold(heard == said[: len(heard)], "what is heard was said, in order")
    except RemoteProtocolError:
        pass


def framing(data: bytes) -> None:
    """A decoder fed in two pieces."""
    decoder = FrameDecoder()
    try:
        for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
            decoder.feed_untrusted(piece)
            _hold(decoder.held <= MAX_FRAME_BYTES + 4, "at most one frame is kept")
    except RemoteProtocolError:
        pass


def _hold(holds: bool, what: str) -> None:  # noqa: FBT001 - reads like an assertion
    if not holds:
        raise Broken(what)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "yamux": yamux,
    "noise": noise,
    "framing": framing,
}
