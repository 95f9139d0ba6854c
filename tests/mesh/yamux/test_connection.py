"""One side of a session, frame by frame, against what the specification says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_node.mesh.yamux import events as told
from pinaivu_node.mesh.yamux.connection import Connection, Limits
from pinaivu_node.mesh.yamux.frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    INITIAL_WINDOW,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Reason,
    pack,
)
from pinaivu_node.mesh.yamux.states import FINAL, TRANSITIONS, Change, State, after
from pinaivu_node.protocol.errors import LocalProtocolError, RemoteProtocolError


def listener(**limits) -> Connection:
    return Connection(is_dialler=False, limits=Limits(**limits))


def dialler(**limits) -> Connection:
    return Connection(is_dialler=True, limits=Limits(**limits))


def frames_of(data: bytes) -> list[tuple[int, int, int, int, bytes]]:
    """Type, flags, stream, length and payload of each frame."""
    frames = []
    at = 0
    while at < len(data):
        version, kind, flags, number, length = HEADER.unpack_from(data, at)
        assert version == 0
        at += HEADER.size
        payload = data[at : at + length] if kind == DATA else b""
        at += len(payload)
        frames.append((kind, flags, number, length, payload))
    return frames


def opened(connection: Connection, number: int):
    connection.receive_untrusted(pack(WINDOW_UPDATE, SYN, number, 0), now=0.0)
    connection.data_to_send()
    (event,) = [event for event in connection.take_events() if isinstance(event, told.Opened)]
    return event.stream


def test_golden_bytes():
    connection = dialler()
    stream = connection.open_stream()
    stream.send(b"hi")
    stream.send(b"!")
    stream.end()
    connection.ping(now=0.0)
    connection.go_away()
    golden = [
        "0001 0001 00000001 00000000",  # SYN
        "0002 0001 00000000 00000001",  # ping 1
        "0003 0000 00000000 00000000",  # go away, normally
        "0000 0000 00000001 00000003 686921",  # both writes in one frame
        "0001 0004 00000001 00000000",  # FIN
    ]
    assert connection.data_to_send() == bytes.fromhex(" ".join(golden))
    assert not connection.has_data_to_send


class TestOpening:
    def test_a_dialler_opens_odd_streams_and_a_listener_even_ones(self):
        assert [dialler().open_stream().number for _ in range(1)] == [1]
        connection = dialler()
        assert [connection.open_stream().number for _ in range(3)] == [1, 3, 5]
        connection = listener()
        assert [connection.open_stream().number for _ in range(3)] == [2, 4, 6]

    def test_a_syn_is_acknowledged_at_once_and_told(self):
        connection = listener()
        connection.receive_untrusted(pack(WINDOW_UPDATE, SYN, 7, 0), now=0.0)
        (event,) = connection.take_events()
        assert isinstance(event, told.Opened)
        assert frames_of(connection.data_to_send()) == [(WINDOW_UPDATE, ACK, 7, 0, b"")]

    def test_data_may_come_with_the_syn(self):
        connection = listener()
        connection.receive_untrusted(pack(DATA, SYN, 1, 5) + b"hello", now=0.0)
        event, readable = connection.take_events()
        assert event.stream.read() == b"hello"
        assert readable == told.Readable(event.stream)

    def test_numbers_need_not_grow(self):
        connection = listener()
        assert opened(connection, 9).number == 9
        assert opened(connection, 5).number == 5

    def test_the_opener_may_be_given_more_window_with_the_acknowledgement(self):
        connection = dialler()
        stream = connection.open_stream()
        connection.receive_untrusted(pack(WINDOW_UPDATE, ACK, 1, 1000), now=0.0)
        assert stream.credit == INITIAL_WINDOW + 1000
        assert connection.take_events() == [told.Acknowledged(stream)]

    def test_no_more_than_the_backlog_waits_for_its_acknowledgement(self):
        connection = dialler(open_backlog=2)
        first = connection.open_stream()
        connection.open_stream()
        assert not connection.can_open
        with pytest.raises(LocalProtocolError):
            connection.open_stream()
        connection.receive_untrusted(pack(WINDOW_UPDATE, ACK, first.number, 0), now=0.0)
        assert connection.can_open
        connection.open_stream()
        assert not connection.can_open

    def test_a_stream_that_is_refused_leaves_the_backlog(self):
        connection = dialler(open_backlog=1)
        stream = connection.open_stream()
        connection.receive_untrusted(pack(WINDOW_UPDATE, RST, stream.number, 0), now=0.0)
        assert stream.state is State.WAS_RESET
        assert connection.can_open

    def test_one_stream_too_many_is_refused_and_many_more_break_the_protocol(self):
        connection = listener(inbound_streams=2, refusals=3)
        for number in (1, 3):
            opened(connection, number)
        for number in (5, 7, 9):
            connection.receive_untrusted(pack(DATA, SYN, number, 3) + b"abc", now=0.0)
            assert frames_of(connection.data_to_send()) == [(WINDOW_UPDATE, RST, number, 0, b"")]
        with pytest.raises(RemoteProtocolError, match="opens more than"):
            connection.receive_untrusted(pack(WINDOW_UPDATE, SYN, 11, 0), now=0.0)


class TestClosing:
    def test_an_end_comes_after_the_bytes_and_the_other_direction_goes_on(self):
        connection = listener()
        stream = opened(connection, 1)
        connection.receive_untrusted(
            pack(DATA, 0, 1, 3) + b"all" + pack(WINDOW_UPDATE, FIN, 1, 0), now=0.0
        )
        assert stream.read() == b"all"
        assert stream.complete
        assert stream.state is State.THEY_ENDED
        stream.send(b"answer")
        stream.end()
        assert frames_of(connection.data_to_send()) == [
            (DATA, 0, 1, 6, b"answer"),
            (WINDOW_UPDATE, FIN, 1, 0, b""),
        ]
        assert stream.state is State.ENDED
        assert connection.streams == 0
        assert told.Closed(stream) in connection.take_events()

    def test_a_fin_may_come_with_the_last_bytes_in_pieces(self):
        connection = listener()
        stream = opened(connection, 1)
        wire = pack(DATA, FIN, 1, 4) + b"last"
        for at in range(len(wire)):
            assert not stream.complete
            connection.receive_untrusted(wire[at : at + 1], now=0.0)
        assert stream.complete
        assert stream.read() == b"last"

    def test_a_reset_is_no_end_and_what_had_arrived_can_be_read(self):
        connection = listener()
        stream = opened(connection, 1)
        connection.receive_untrusted(
            pack(DATA, 0, 1, 4) + b"some" + pack(WINDOW_UPDATE, RST, 1, 0), now=0.0
        )
        assert stream.state is State.WAS_RESET
        assert not stream.complete
        assert stream.read() == b"some"
        assert stream.read() == b""
        assert not stream.can_send

    def test_resetting_drops_what_was_queued_and_says_so_once(self):
        connection = dialler()
        stream = connection.open_stream()
        stream.send(b"never")
        stream.reset()
        stream.reset()
        assert frames_of(connection.data_to_send()) == [
            (WINDOW_UPDATE, SYN, 1, 0, b""),
            (WINDOW_UPDATE, RST, 1, 0, b""),
        ]
        with pytest.raises(LocalProtocolError):
            stream.send(b"more")

    def test_what_crosses_our_reset_is_skipped(self):
        connection = listener()
        stream = opened(connection, 1)
        connection.receive_untrusted(pack(DATA, 0, 1, 10) + b"in the", now=0.0)
        stream.reset()
        connection.receive_untrusted(b" way" + pack(DATA, 0, 1, 4) + b"more", now=0.0)
        connection.receive_untrusted(pack(WINDOW_UPDATE, FIN, 1, 9), now=0.0)
        assert stream.read() == b""

    def test_nothing_can_be_sent_after_the_end(self):
        stream = dialler().open_stream()
        stream.end()
        assert not stream.can_send
        with pytest.raises(LocalProtocolError):
            stream.send(b"late")


class TestFlowControl:
    def test_no_more_is_sent_than_the_window_and_the_rest_when_it_opens(self):
        connection = dialler()
        stream = connection.open_stream()
        stream.send(bytes(INITIAL_WINDOW + 100))
        sent = sum(frame[3] for _ in range(9) for frame in frames_of(connection.data_to_send()))
        assert sent == INITIAL_WINDOW
        assert stream.unsent == 100
        assert not connection.has_data_to_send
        connection.receive_untrusted(pack(WINDOW_UPDATE, 0, 1, 60), now=0.0)
        assert [frame[3] for frame in frames_of(connection.data_to_send())] == [60]

    def test_a_window_is_given_back_by_halves_as_it_is_read(self):
        connection = listener()
        stream = opened(connection, 1)
        half = INITIAL_WINDOW // 2
        connection.receive_untrusted(pack(DATA, 0, 1, half) + bytes(half), now=0.0)
        assert len(stream.read(half - 1)) == half - 1
        assert connection.data_to_send() == b""
        stream.read(1)
        assert frames_of(connection.data_to_send()) == [(WINDOW_UPDATE, 0, 1, half, b"")]

    @pytest.mark.parametrize("flags", [0, FIN, SYN])
    def test_one_byte_beyond_the_window_breaks_the_protocol_before_it_is_kept(self, flags):
        connection = listener()
        number = 3 if flags & SYN else opened(connection, 1).number
        with pytest.raises(RemoteProtocolError, match="flow control"):
            connection.receive_untrusted(
                pack(DATA, flags, number, INITIAL_WINDOW + 1) + b"x" * 100, now=0.0
            )

    def test_a_window_that_cannot_be_said_breaks_the_protocol(self):
        connection = dialler()
        connection.open_stream()
        connection.receive_untrusted(pack(WINDOW_UPDATE, ACK, 1, 2**32 - 1 - INITIAL_WINDOW), now=0)
        with pytest.raises(RemoteProtocolError, match="a window of"):
            connection.receive_untrusted(pack(WINDOW_UPDATE, 0, 1, 1), now=0.0)

    def test_many_tiny_frames_cost_little_more_than_their_bytes(self):
        connection = listener()
        stream = opened(connection, 1)
        connection.receive_untrusted((pack(DATA, 0, 1, 1) + b"x") * 20_000, now=0.0)
        assert stream.unread == 20_000
        assert len(stream._incoming) < 150
        assert stream.read() == b"x" * 20_000

    def test_room_is_told_once_when_enough_has_left(self):
        connection = dialler()
        stream = connection.open_stream()
        stream.send(bytes(100_000))
        stream.want_room(50_000)
        connection.data_to_send(30_000)
        assert connection.take_events() == []
        connection.data_to_send(30_000)
        assert connection.take_events() == [told.Writable(stream)]
        connection.data_to_send()
        assert connection.take_events() == []

    def test_a_reset_wakes_who_waits_for_room(self):
        connection = dialler()
        stream = connection.open_stream()
        stream.send(bytes(INITIAL_WINDOW * 2))
        stream.want_room(0)
        connection.receive_untrusted(pack(WINDOW_UPDATE, RST, 1, 0), now=0.0)
        assert told.Writable(stream) in connection.take_events()


class TestWindows:
    def fill(self, connection, stream, *, start: float, every: float, times: int) -> int:
        """Send half a window, read it, and so on; returns the window after that."""
        now = start
        for _ in range(times):
            size = stream.window.size // 2
            now += every
            for _ in range(0, size, 65_536):
                connection.receive_untrusted(pack(DATA, 0, 1, 65_536) + bytes(65_536), now=now)
                stream.read()
        return stream.window.size

    def measured(self, round_trip: float, **limits) -> tuple[Connection, object]:
        connection = listener(**limits)
        stream = opened(connection, 1)
        connection.ping(now=0.0)
        connection.receive_untrusted(pack(PING, ACK, 0, 1), now=round_trip)
        assert connection.round_trip == pytest.approx(round_trip)
        return connection, stream

    def test_a_window_that_holds_its_peer_up_grows(self):
        connection, stream = self.measured(0.1)
        assert self.fill(connection, stream, start=0.1, every=0.1, times=3) == 8 * INITIAL_WINDOW

    def test_a_window_that_does_not_stays(self):
        connection, stream = self.measured(0.1)
        assert self.fill(connection, stream, start=0.1, every=0.5, times=3) == INITIAL_WINDOW

    def test_no_window_grows_before_the_round_trip_is_known(self):
        connection = listener()
        stream = opened(connection, 1)
        assert self.fill(connection, stream, start=0.0, every=0.0, times=3) == INITIAL_WINDOW

    def test_a_window_grows_no_further_than_the_largest(self):
        connection, stream = self.measured(0.1, largest_window=3 * INITIAL_WINDOW)
        assert self.fill(connection, stream, start=0.1, every=0.1, times=5) == 3 * INITIAL_WINDOW

    def test_all_windows_together_stay_within_the_budget(self):
        connection, stream = self.measured(0.1, window_budget=4 * INITIAL_WINDOW)
        opened(connection, 3)
        assert self.fill(connection, stream, start=0.1, every=0.1, times=5) == 3 * INITIAL_WINDOW
        assert connection.budget.total == 4 * INITIAL_WINDOW
        stream.reset()
        assert connection.budget.total == INITIAL_WINDOW


class TestKeepAlive:
    def test_a_ping_is_echoed(self):
        connection = listener()
        connection.receive_untrusted(pack(PING, SYN, 0, 77), now=0.0)
        assert frames_of(connection.data_to_send()) == [(PING, ACK, 0, 77, b"")]

    def test_the_round_trip_is_measured_and_only_by_the_ping_that_is_out(self):
        connection = dialler()
        connection.ping(now=1.0)
        connection.ping(now=1.1)
        assert [frame[3] for frame in frames_of(connection.data_to_send())] == [1]
        connection.receive_untrusted(pack(PING, ACK, 0, 99), now=1.2)
        assert connection.round_trip is None
        connection.receive_untrusted(pack(PING, ACK, 0, 1), now=1.25)
        assert connection.round_trip == pytest.approx(0.25)
        (event,) = connection.take_events()
        assert isinstance(event, told.Measured)
        connection.receive_untrusted(pack(PING, ACK, 0, 1), now=9.0)
        assert connection.take_events() == []

    def test_a_peer_that_pings_and_never_reads_is_cut_off(self):
        connection = listener(queued_replies=100)
        with pytest.raises(RemoteProtocolError, match="more than it reads"):
            connection.receive_untrusted(pack(PING, SYN, 0, 1) * 101, now=0.0)


class TestGoingAway:
    def test_after_it_streams_are_refused_and_open_ones_go_on(self):
        connection = listener()
        stream = opened(connection, 1)
        connection.go_away(Reason.INTERNAL_ERROR)
        connection.go_away()
        assert frames_of(connection.data_to_send()) == [(GO_AWAY, 0, 0, 2, b"")]
        connection.receive_untrusted(pack(WINDOW_UPDATE, SYN, 3, 0), now=0.0)
        assert frames_of(connection.data_to_send()) == [(WINDOW_UPDATE, RST, 3, 0, b"")]
        stream.send(b"goes on")
        assert frames_of(connection.data_to_send()) == [(DATA, 0, 1, 7, b"goes on")]

    def test_the_peers_is_told_and_nothing_is_opened_after_it(self):
        connection = dialler()
        connection.receive_untrusted(pack(GO_AWAY, 0, 0, 0), now=0.0)
        assert connection.take_events() == [told.GoneAway(0)]
        assert not connection.can_open
        connection.receive_untrusted(pack(GO_AWAY, 0, 0, 1), now=0.0)
        assert connection.take_events() == []


class TestHostilePeers:
    @pytest.mark.parametrize(
        "wire",
        [
            pytest.param(b"\x01" + bytes(11), id="another version"),
            pytest.param(pack(4, 0, 0, 0), id="an unknown type"),
            pytest.param(pack(WINDOW_UPDATE, 16, 2, 0), id="an unknown flag"),
            pytest.param(pack(DATA, 0, 0, 0), id="data for the session"),
            pytest.param(pack(WINDOW_UPDATE, 0, 0, 1), id="a window for the session"),
            pytest.param(pack(PING, SYN, 1, 1), id="a ping for a stream"),
            pytest.param(pack(GO_AWAY, 0, 1, 0), id="a stream goes away"),
            pytest.param(pack(WINDOW_UPDATE, SYN, 0, 0), id="SYN for the session"),
            pytest.param(pack(WINDOW_UPDATE, SYN, 2, 0), id="SYN for one of ours"),
            pytest.param(pack(WINDOW_UPDATE, SYN, 1, 0) * 2, id="SYN twice"),
            pytest.param(pack(DATA, 0, 1, 1), id="data for a stream of theirs that never was"),
            pytest.param(pack(DATA, 0, 2, 1), id="data for a stream of ours that never was"),
            pytest.param(pack(WINDOW_UPDATE, RST, 4, 0), id="RST for a stream that never was"),
            pytest.param(
                pack(WINDOW_UPDATE, SYN | FIN, 1, 0) + pack(DATA, 0, 1, 1), id="data after FIN"
            ),
        ],
    )
    def test_what_breaks_the_protocol(self, wire):
        with pytest.raises(RemoteProtocolError):
            listener().receive_untrusted(wire, now=0.0)

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(
            st.one_of(
                st.binary(max_size=40),
                st.builds(
                    lambda kind, flags, number, length, body: (
                        pack(kind, flags, number, length) + body
                    ),
                    st.integers(0, 4),
                    st.integers(0, 31),
                    st.integers(0, 9),
                    st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1)),
                    st.binary(max_size=20),
                ),
            ),
            max_size=20,
        )
    )
    def test_whatever_the_bytes_the_fault_is_the_peers(self, chunks):
        connection = listener(inbound_streams=3, queued_replies=10)
        connection.open_stream().send(bytes(300_000))
        try:
            for chunk in chunks:
                connection.receive_untrusted(chunk, now=0.0)
                for event in connection.take_events():
                    if isinstance(event, told.Opened) and event.stream.can_send:
                        event.stream.send(b"welcome")
                connection.data_to_send(2000)
        except RemoteProtocolError:
            pass
        connection.lose()
        assert connection.streams == 0


class TestStates:
    def test_final_states_are_those_that_nothing_leaves(self):
        assert {State.ENDED, State.RESET, State.WAS_RESET, State.LOST} == FINAL

    def test_an_illegal_change_changes_nothing(self):
        assert after(State.WE_ENDED, Change.WE_END) is None
        assert after(State.RESET, Change.LOSE) is None

    @pytest.mark.parametrize("state", [state for state in State if state not in FINAL])
    def test_every_open_state_can_be_reset_by_both_and_lost(self, state):
        assert {Change.WE_RESET, Change.THEY_RESET, Change.LOSE} <= TRANSITIONS[state].keys()
