"""What a chain of fingerprints tells, and what it keeps to itself."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_gateway.fingerprints import FINGERPRINT_BYTES, fingerprint_chain
from pinaivu_node.protocol.inference import ChatTurn, Tool, ToolCall, ToolChoice, ToolUse
from pinaivu_node.protocol.market import MAX_FINGERPRINTS

SECRET = b"s" * 32
words = st.text(alphabet="abc\u00e9\x00", max_size=5)
turns = st.lists(st.builds(ChatTurn, role=words, content=words), max_size=6)


def said(*contents: str, role: str = "user") -> list[ChatTurn]:
    return [ChatTurn(role=role, content=content) for content in contents]


def test_a_turn_is_an_hmac_over_everything_before_it_and_itself() -> None:
    """Spelled out here once more, because caches of two releases must agree on it."""

    def link(before: bytes, role: bytes, content: bytes) -> bytes:
        lengths = [len(part).to_bytes(4, "big") for part in (role, content)]
        return hmac.new(
            SECRET, before + lengths[0] + role + lengths[1] + content, hashlib.sha256
        ).digest()

    first = link(b"", b"system", b"be brief")
    second = link(first, b"user", "h\u00e9".encode())
    chain = fingerprint_chain(
        SECRET,
        [ChatTurn(role="system", content="be brief"), ChatTurn(role="user", content="h\u00e9")],
    )
    assert chain == (first[:FINGERPRINT_BYTES], second[:FINGERPRINT_BYTES])


@given(turns, turns)
def test_conversations_share_exactly_the_prefix_that_they_share(
    one: list[ChatTurn], other: list[ChatTurn]
) -> None:
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    ours, theirs = fingerprint_chain(SECRET, one), fingerprint_chain(SECRET, other)
    assert ours[:shared] == theirs[:shared]
    assert not set(ours[shared:]) & set(theirs[shared:])


@given(turns.filter(bool))
def test_two_clients_with_the_same_conversation_have_nothing_in_common(
    conversation: list[ChatTurn],
) -> None:
    mine = fingerprint_chain(b"m" * 32, conversation)
    yours = fingerprint_chain(b"y" * 32, conversation)
    assert not set(mine) & set(yours)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ChatTurn(role="use", content="rx"), ChatTurn(role="user", content="x")),
        (ChatTurn(role="", content="x"), ChatTurn(role="x", content="")),
    ],
)
def test_a_letter_that_changes_sides_changes_the_fingerprint(
    one: ChatTurn, other: ChatTurn
) -> None:
    assert fingerprint_chain(SECRET, [one]) != fingerprint_chain(SECRET, [other])


def test_of_a_very_long_conversation_the_newest_turns_are_named() -> None:
    contents = [str(number) for number in range(MAX_FINGERPRINTS + 10)]
    chain = fingerprint_chain(SECRET, said(*contents))
    assert len(chain) == MAX_FINGERPRINTS
    # One turn more moves the window by one and changes no name.
    assert fingerprint_chain(SECRET, said(*contents, "more"))[:-1] == chain[1:]


def test_nothing_said_has_no_fingerprint() -> None:
    assert fingerprint_chain(SECRET, []) == ()


def test_what_is_called_and_what_could_be_called_is_part_of_the_conversation() -> None:
    call = ToolCall(id="call_1", name="weather", arguments="{}")
    weather = ToolUse(tools=(Tool(name="weather"),))
    variants = [
        fingerprint_chain(SECRET, [turn], tools)
        for turn in (
            ChatTurn(role="assistant", content=""),
            ChatTurn(role="assistant", content="", tool_calls=(call,)),
            ChatTurn(role="assistant", content="", tool_calls=(call, call)),
            ChatTurn(role="assistant", content="", tool_call_id="call_1"),
        )
        for tools in (None, weather, ToolUse(tools=(*weather.tools, Tool(name="time"))))
    ]
    assert len(set(variants)) == len(variants)


def test_how_tools_are_to_be_used_changes_no_prompt() -> None:
    tools = (Tool(name="weather"),)
    one, other = ToolUse(tools=tools), ToolUse(tools=tools, choice=ToolChoice.NONE)
    assert fingerprint_chain(SECRET, said("a"), one) == fingerprint_chain(SECRET, said("a"), other)
