"""Names for the beginnings of conversations."""

from __future__ import annotations

import hashlib
import hmac

from hypothesis import given
from hypothesis import strategies as st

from pinaivu_gateway.fingerprints import fingerprint_chain
from pinaivu_node.protocol.inference import ChatTurn

turns = st.lists(
    st.builds(
        ChatTurn,
        role=st.sampled_from(["system", "user", "assistant"]),
        content=st.text(max_size=20).filter(lambda text: text.isprintable()),
    ),
    max_size=6,
)


@given(turns, turns)
def test_the_common_beginning_of_two_conversations_has_the_same_names(one, other):
    left, right = fingerprint_chain(b"key", one), fingerprint_chain(b"key", other)
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    assert left[:same] == right[:same]
    assert not set(left[same:]) & set(right[same:])


def test_another_key_gives_other_names():
    chat = [ChatTurn(role="user", content="hello")]
    assert fingerprint_chain(b"one", chat) != fingerprint_chain(b"two", chat)


def test_role_and_content_do_not_run_into_each_other():
    left = [ChatTurn(role="user", content="ab")]
    right = [ChatTurn(role="usera", content="b")]
    assert fingerprint_chain(b"key", left) != fingerprint_chain(b"key", right)


def test_the_bytes_are_as_documented():
    chain = fingerprint_chain(b"key", [ChatTurn(role="user", content="é")])
    message = b"\0\0\0\4user" + b"\0\0\0\2" + "é".encode()
    assert chain == (hmac.digest(b"key", message, hashlib.sha256)[:16],)


def test_of_a_long_conversation_the_newest_turns_are_named():
    chat = [ChatTurn(role="user", content=str(number)) for number in range(300)]
    chain = fingerprint_chain(b"key", chat)
    assert len(chain) == 256
    assert chain[-1] not in fingerprint_chain(b"key", chat[:-1])
    assert chain[0] == fingerprint_chain(b"key", chat[:45])[-1]
