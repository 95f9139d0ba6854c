from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.mesh.framing import END, END_FRAME, FrameDecoder, encode_frame
from pinaivu_node.mesh.mesh import MAX_FRAME_BYTES
from pinaivu_node.protocol.errors import LocalProtocolError, RemoteProtocolError


def test_golden_bytes():
    assert encode_frame(b"") == bytes.fromhex("0100")
    assert encode_frame(b"hi") == bytes.fromhex("03006869")
    assert encode_frame(bytes(127)) == bytes.fromhex("800100") + bytes(127)
    assert encode_frame(bytes(MAX_FRAME_BYTES))[:4] == bytes.fromhex("81804000")
    assert bytes.fromhex("0101") == END_FRAME


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 50))
def test_frames_survive_any_cutting(frames, size):
    wire = b"".join(map(encode_frame, frames)) + END_FRAME
    decoder = FrameDecoder()
    decoded = []
    for start in range(0, len(wire), size):
        decoded += decoder.feed_untrusted(wire[start : start + size])
    assert decoded == [*frames, END]
    assert decoder.held == 0


@given(st.lists(st.binary(max_size=100), max_size=10))
def test_whatever_the_bytes_the_fault_is_the_peers(chunks):
    decoder = FrameDecoder()
    try:
        for chunk in chunks:
            decoder.feed_untrusted(chunk)
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"\x00", id="a frame without a type"),
        pytest.param(b"\x82\x80\x40", id="one byte too long"),
        pytest.param(b"\x80\x80\x80\x80\x04", id="a gibibyte"),
        pytest.param(b"\xff" * 10, id="a length that never ends"),
        pytest.param(b"\x01\x02", id="an unknown type"),
        pytest.param(b"\x02\x01x", id="END with a payload"),
        pytest.param(END_FRAME + encode_frame(b"x"), id="a frame after END"),
        pytest.param(END_FRAME + END_FRAME, id="END twice"),
    ],
)
def test_hostile_bytes(wire):
    with pytest.raises(RemoteProtocolError):
        FrameDecoder().feed_untrusted(wire)


def test_the_longest_frame_is_held_but_no_more():
    decoder = FrameDecoder()
    assert decoder.feed_untrusted(encode_frame(bytes(MAX_FRAME_BYTES))[:-1]) == []
    assert decoder.held == MAX_FRAME_BYTES + 3
    assert decoder.feed_untrusted(b"\0") == [bytes(MAX_FRAME_BYTES)]


def test_a_frame_too_long_is_our_bug():
    with pytest.raises(LocalProtocolError):
        encode_frame(bytes(MAX_FRAME_BYTES + 1))
