"""Coverage-guided fuzzing of what strangers' bytes reach first.

Run as `python tests/fuzz/targets.py yamux|framing [libFuzzer options]`, for as long as you like;
the test beside it does so for a moment.  A target fails when it raises, or keeps more than it may.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["pinaivu_node"]):
    from pinaivu_node.mesh.framing import FrameDecoder
    from pinaivu_node.mesh.mesh import MAX_FRAME_BYTES
    from pinaivu_node.mesh.yamux import events as told
    from pinaivu_node.mesh.yamux.connection import Connection, Limits
    from pinaivu_node.protocol.errors import RemoteProtocolError

LIMITS = Limits(inbound_streams=4, refusals=8, queued_replies=16, window_budget=1 << 20)
MAX_HELD = 4 * (256 << 10) + (2 << 20)
"""The windows of all inbound streams, those of our own, and what of the budget is left."""


def yamux(data: bytes) -> None:
    """One side with streams of its own, fed in pieces, its owner reading, ending and resetting."""
    dice = atheris.FuzzedDataProvider(data)
    connection = Connection(is_dialler=dice.ConsumeBool(), limits=LIMITS)
    streams = [connection.open_stream(), connection.open_stream()]
    streams[0].send(bytes(300_000))
    now = 0.0
    try:
        while dice.remaining_bytes():
            now += 0.01
            connection.receive_untrusted(dice.ConsumeBytes(dice.ConsumeIntInRange(1, 64)), now=now)
            events = connection.take_events()
            streams += [event.stream for event in events if isinstance(event, told.Opened)]
            assert sum(stream.unread for stream in streams) <= MAX_HELD
            stream = streams[dice.ConsumeIntInRange(0, len(streams) - 1)]
            match dice.ConsumeIntInRange(0, 7):
                case 0:
                    stream.reset()
                case 1:
                    stream.end()
                case 2 | 3:
                    stream.read(dice.ConsumeIntInRange(1, 100))
                case 4:
                    connection.ping(now=now)
                case 5 if stream.can_send:
                    stream.send(b"more")
                case _:
                    assert len(connection.data_to_send(4096)) <= 4096
    except RemoteProtocolError:
        pass
    connection.lose()
    assert connection.budget.total == 0
    assert connection.streams == 0


def framing(data: bytes) -> None:
    """A decoder fed in two pieces."""
    decoder = FrameDecoder()
    try:
        for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
            decoder.feed_untrusted(piece)
            assert decoder.held <= MAX_FRAME_BYTES + 4
    except RemoteProtocolError:
        pass


if __name__ == "__main__":
    target = {"yamux": yamux, "framing": framing}[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
