"""Tools from OpenAI's words to the network's, and calls back again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_gateway.errors import RequestRefused
from pinaivu_gateway.openai_schema import ChatRequest, parse_untrusted
from pinaivu_gateway.tools import CallsSaid, most_tokens_of_tools, tool_use_of
from pinaivu_gateway.translate import chat_turns
from pinaivu_node.protocol.ids import request_id_of
from pinaivu_node.protocol.inference import (
    MAX_CONSTRAINT_CHARACTERS,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    ToolUse,
)

REQUEST = request_id_of(bytes(16))
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "required": ["é"]}},
}


def asked(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields}
    return parse_untrusted(json.dumps(body).encode(), ChatRequest)


def use_of(**fields: Any) -> ToolUse | None:
    request = asked(**fields)
    return tool_use_of(request.tools, request.tool_choice, parallel=request.parallel_tool_calls)


@pytest.mark.parametrize(
    ("choice", "kind", "named"),
    [
        (None, ToolChoice.AUTO, None),
        ("auto", ToolChoice.AUTO, None),
        ("none", ToolChoice.NONE, None),
        ("required", ToolChoice.REQUIRED, None),
        (
            {"type": "function", "function": {"name": "weather"}},
            ToolChoice.REQUIRED,
            "weather",
        ),
    ],
)
def test_every_choice_has_its_word(choice, kind, named):
    use = use_of(tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    assert use == ToolUse(
        tools=(Tool(name="weather", parameters='{"type":"object","required":["é"]}'),),
        choice=kind,
        named=named,
        parallel=False,
    )


def test_a_tool_without_parameters_takes_none():
    use = use_of(tools=[{"type": "function", "function": {"name": "now"}}])
    assert use is not None
    assert json.loads(use.tools[0].parameters) == {"type": "object", "properties": {}}


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_no_tools_are_no_tools(choice):
    assert use_of(tools=[], tool_choice=choice) is None


LARGE = {"const": "x" * (MAX_CONSTRAINT_CHARACTERS // 2)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "time"}},
            },
            "tool_choice",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": name, "parameters": LARGE}}
                    for name in ("a", "b")
                ]
            },
            "tools",
        ),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(fields, param):
    with pytest.raises(RequestRefused) as refused:
        use_of(**fields)
    assert refused.value.problem.param == param


def test_the_calls_of_a_history_reach_the_model():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{"}}
    request = asked(
        messages=[
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        ]
    )
    _, said, answered = chat_turns(request.messages)
    assert (said.content, said.tool_call_id) == ("", "")
    assert said.tool_calls == (ToolCall(id="c1", name="weather", arguments="{"),)
    assert (answered.role, answered.tool_call_id) == ("tool", "c1")


def test_a_message_that_says_nothing_at_all_is_still_refused():
    request = asked(messages=[{"role": "assistant", "tool_calls": []}])
    with pytest.raises(RequestRefused) as refused:
        chat_turns(request.messages)
    assert refused.value.problem.param == "messages[0].content"


def test_room_is_held_for_tools_however_they_are_spelled_out():
    use = use_of(tools=[WEATHER])
    assert most_tokens_of_tools(None) == 0
    assert most_tokens_of_tools(use) > len(json.dumps([WEATHER], indent=4))


def test_a_stream_names_a_call_once():
    calls = CallsSaid(REQUEST)
    first, more = calls.deltas(
        [
            ToolCallDelta(index=0, id="c1", name="weather", arguments='{"'),
            ToolCallDelta(index=0, arguments='a":1}'),
        ]
    )
    assert first == {
        "index": 0,
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"'},
    }
    assert more == {"index": 0, "function": {"arguments": 'a":1}'}}
    named = {"name": "weather", "arguments": '{"a":1}'}
    assert calls.whole() == [{"id": "c1", "type": "function", "function": named}]


def test_a_call_without_an_id_is_given_one_and_no_two_the_same():
    calls = CallsSaid(REQUEST)
    calls.deltas(ToolCallDelta(index=index, name="a") for index in range(3))
    ids = {call["id"] for call in calls.whole()}
    assert len(ids) == 3
    assert all(each.startswith("call_") for each in ids)


@given(
    st.lists(
        st.builds(
            ToolCallDelta,
            index=st.integers(0, 3),
            id=st.none() | st.text(max_size=3),
            name=st.none() | st.text(min_size=1, max_size=3),
            arguments=st.text(max_size=3),
        ),
        max_size=8,
    )
)
def test_what_is_streamed_adds_up_to_the_whole(pieces):
    said, whole = CallsSaid(REQUEST), {}
    for piece in pieces:
        for delta in said.deltas([piece]):
            if "id" in delta:
                assert delta["index"] not in whole
                whole[delta["index"]] = {"name": delta["function"]["name"], "arguments": ""}
            whole[delta["index"]]["arguments"] += delta["function"]["arguments"]
    assert [call["function"] for call in said.whole()] == [
        each for _, each in sorted(whole.items())
    ]
