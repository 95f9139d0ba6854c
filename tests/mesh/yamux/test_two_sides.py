"""Two state machines, a wire cut anywhere, and all that their owners can do, in any order."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_node.mesh.yamux import events as told
from pinaivu_node.mesh.yamux.connection import Connection, Limits
from pinaivu_node.mesh.yamux.states import State
from pinaivu_node.mesh.yamux.stream import Stream

LIMITS = Limits(
    inbound_streams=6,
    refusals=10_000,
    open_backlog=4,
    window_budget=2 << 20,
    largest_window=1 << 20,
)
PATTERN = bytes(range(251)) * 4000
"""Any piece of it tells where it was cut from, up to 251 bytes: a lost or repeated piece shows."""


@dataclass(eq=False)
class Half:
    """What one side did with one stream."""

    stream: Stream
    sent: int = 0
    read: int = 0
    ended: bool = False
    reset: bool = False


@dataclass
class Side:
    connection: Connection
    wire: bytearray = field(default_factory=bytearray)
    halves: dict[int, Half] = field(default_factory=dict)
    everything: list[Half] = field(default_factory=list)

    def adopt(self, stream: Stream) -> None:
        half = self.halves[stream.number] = Half(stream)
        self.everything.append(half)

    def look(self) -> None:
        for event in self.connection.take_events():
            if isinstance(event, told.Opened):
                self.adopt(event.stream)

    def emit(self, limit: int) -> None:
        data = self.connection.data_to_send(limit)
        assert len(data) <= limit
        self.wire += data
        self.look()

    def check(self) -> None:
        connection = self.connection
        streams = list(connection._streams.values())
        assert connection.budget.total == sum(stream.window.size for stream in streams)
        assert connection._inbound == sum(not stream.is_ours for stream in streams)
        assert connection._inbound <= LIMITS.inbound_streams
        assert connection._unacknowledged <= LIMITS.open_backlog
        assert len(connection._head) < 12
        for stream in streams:
            window = stream.window
            assert window.allowance >= 0
            in_body = connection._body_left if connection._body_stream is stream else 0
            if stream.is_receiving:
                assert window.allowance + in_body + stream.unread + window._read == window.size
            assert stream.unread == sum(map(len, stream._incoming)) - stream.offset
            assert stream.unsent == sum(map(len, stream._outgoing))
            assert window.size <= LIMITS.largest_window


class Pair:
    def __init__(self) -> None:
        self.sides = [
            Side(Connection(is_dialler=True, limits=LIMITS)),
            Side(Connection(is_dialler=False, limits=LIMITS)),
        ]
        self.now = 0.0

    def act(self, side: int, what: str, which: int, size: int) -> None:
        here, there = self.sides[side], self.sides[1 - side]
        halves = list(here.halves.values())
        half = halves[which % len(halves)] if halves else None
        match what:
            case "open" if here.connection.can_open:
                here.adopt(here.connection.open_stream())
            case "send" if half is not None and half.stream.can_send:
                half.stream.send(PATTERN[half.sent % 251 :][:size])
                half.sent += size
            case "read" if half is not None:
                self.read(half, size)
            case "end" if half is not None:
                half.ended = half.ended or half.stream.can_send
                half.stream.end()
            case "reset" if half is not None:
                half.reset = True
                half.stream.reset()
            case "ping":
                here.connection.ping(now=self.now)
            case "leave" if size == 13 and which == 13:
                here.connection.go_away()
            case "emit":
                here.emit(12 + 1024 + size)
            case "deliver":
                self.now += 0.001
                piece = bytes(here.wire[:size])
                del here.wire[:size]
                there.connection.receive_untrusted(piece, now=self.now)
                there.look()
        here.look()
        here.check()
        there.check()

    def read(self, half: Half, limit: int | None) -> None:
        data = half.stream.read(limit)
        if limit is not None:
            assert len(data) <= limit
        assert data == PATTERN[half.read % 251 :][: len(data)]
        half.read += len(data)

    def settle(self) -> None:
        """Carry and read everything until nothing moves."""
        moved = True
        while moved:
            moved = False
            for side in (0, 1):
                here, there = self.sides[side], self.sides[1 - side]
                while here.wire or here.connection.has_data_to_send:
                    here.emit(65_519)
                    there.connection.receive_untrusted(bytes(here.wire), now=self.now)
                    here.wire.clear()
                    there.look()
                    moved = True
                for half in here.everything:
                    if half.stream.unread:
                        self.read(half, None)
                        moved = True
                here.check()


def halves_of_streams(pair: Pair) -> list[tuple[Half, Half]]:
    """Each stream seen from both sides, as often as it was taken by both."""
    here, there = pair.sides
    both = here.halves.keys() & there.halves.keys()
    return [(here.halves[number], there.halves[number]) for number in both]


ACTION = st.tuples(
    st.integers(0, 1),
    st.sampled_from(
        ["open", "send", "send", "read", "end", "reset", "ping", "leave", "emit", "deliver"]
    ),
    st.integers(0, 15),
    st.one_of(st.integers(1, 40), st.integers(1, 70_000), st.just(300_000)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTION, max_size=80))
def test_every_byte_arrives_once_and_in_order_or_the_stream_says_that_it_did_not(actions):
    pair = Pair()
    for action in actions:
        pair.act(*action)
    pair.settle()
    for one, other in halves_of_streams(pair):
        for sender, receiver in ((one, other), (other, one)):
            assert receiver.read <= sender.sent
            if receiver.stream.complete:
                assert sender.ended
            if receiver.stream.complete and not receiver.reset:
                assert receiver.read == sender.sent
            if not one.reset and not other.reset:
                assert receiver.read == sender.sent
                assert receiver.stream.complete == sender.ended
            if sender.reset and not receiver.stream.complete:
                assert receiver.stream.state in (State.WAS_RESET, State.RESET)


@settings(max_examples=100, deadline=None)
@given(st.lists(ACTION, max_size=60), st.integers(0, 1))
def test_a_lost_connection_ends_no_stream_that_was_not_complete(actions, side):
    pair = Pair()
    for action in actions:
        pair.act(*action)
    loser, other = pair.sides[side], pair.sides[1 - side]
    loser.connection.lose()
    loser.look()
    for half in loser.everything:
        assert half.stream.state in (State.LOST, State.ENDED, State.RESET, State.WAS_RESET)
        pair.read(half, None)
        if half.stream.complete and not half.reset:
            sender = other.halves[half.stream.number]
            assert half.read == sender.sent
    assert loser.connection.streams == 0
    assert loser.connection.budget.total == 0
    assert not loser.connection.can_open


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 13))
def test_streams_take_turns_so_that_a_large_one_delays_no_small_one(large, small, seed):
    here, there = (side.connection for side in Pair().sides)
    bulky = [here.open_stream() for _ in range(min(large, 3))]
    for stream in bulky:
        stream.send(bytes(200_000))
    little = here.open_stream()
    here.data_to_send()
    little.send(b"token" * small)
    there.receive_untrusted(b"", now=float(seed))
    assert b"token" * small in here.data_to_send()
