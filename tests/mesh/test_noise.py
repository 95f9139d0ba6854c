from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.mesh.noise import MAX_PLAINTEXT, Opener, Sealer
from pinaivu_node.protocol.errors import LocalProtocolError, RemoteProtocolError

KEY = bytes(range(32))


def test_golden_bytes():
    """As libsodium seals them."""
    assert Sealer(KEY).seal([b"hi", b""]) == bytes.fromhex(
        "0012 70d1758d3754deb59b15a82aa41453d7c6b9 0010 a8d30d2553bfe08494e6aa8fd5b07296"
    )


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 700), st.integers(0, 2**40))
def test_messages_survive_any_cutting(plaintexts, size, count):
    wire = bytes(Sealer(KEY, count=count).seal(plaintexts))
    opener = Opener(KEY, count=count)
    opened = list(
        itertools.chain.from_iterable(
            opener.open_untrusted(wire[at : at + size]) for at in range(0, len(wire), size)
        )
    )
    assert opened == plaintexts


def test_sealing_one_by_one_or_together_makes_the_same_bytes():
    plaintexts = [b"one", b"", b"three" * 1000]
    together, single = Sealer(KEY), Sealer(KEY)
    assert together.seal(plaintexts) == b"".join(single.seal([text]) for text in plaintexts)


def test_the_longest_message_passes_and_a_longer_one_is_our_bug():
    longest = bytes(MAX_PLAINTEXT)
    assert Opener(KEY).open_untrusted(Sealer(KEY).seal([longest])) == [longest]
    with pytest.raises(LocalProtocolError):
        Sealer(KEY).seal([longest + b"x"])


def test_what_is_opened_does_not_change_with_the_buffer_it_came_in():
    buffer = bytearray(Sealer(KEY).seal([b"first", b"second"]))
    opener = Opener(KEY)
    view = memoryview(buffer)[: len(buffer) - 3]
    first = opener.open_untrusted(view)
    rest = bytes(buffer[-3:])
    buffer[:] = bytes(len(buffer))
    assert first + opener.open_untrusted(rest) == [b"first", b"second"]


@given(st.lists(st.binary(max_size=100), max_size=10))
def test_whatever_the_bytes_the_fault_is_the_peers(chunks):
    opener = Opener(KEY)
    try:
        for chunk in chunks:
            opener.open_untrusted(chunk)
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"\x00\x00", id="nothing, not even a tag"),
        pytest.param(b"\x00\x05hello", id="shorter than a tag"),
        pytest.param(b"\x00\x10" + bytes(16), id="a tag that is none"),
        pytest.param(bytes(Sealer(KEY, count=1).seal([b"x"])), id="another count"),
        pytest.param(bytes(Sealer(KEY[::-1]).seal([b"x"])), id="another key"),
    ],
)
def test_hostile_bytes(wire):
    with pytest.raises(RemoteProtocolError):
        Opener(KEY).open_untrusted(wire)


def test_a_message_repeated_is_refused():
    wire = Sealer(KEY).seal([b"pay"])
    opener = Opener(KEY)
    assert opener.open_untrusted(wire) == [b"pay"]
    with pytest.raises(RemoteProtocolError):
        opener.open_untrusted(wire)
