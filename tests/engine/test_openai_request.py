from __future__ import annotations

import pytest

from pinaivu_node.engine.openai.request import request_body
from pinaivu_node.engine.types import (
    ChatMessage,
    Constraint,
    ConstraintKind,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
    Tool,
    ToolCall,
    ToolChoice,
    ToolUse,
)

HELLO = (ChatMessage("user", "hello"),)
CLOCK = Tool("clock", "tells the time", '{"type": "object"}')


def body_of(prompt=HELLO, *, constraint=None, tools=None, **sampling):
    params = SamplingParams(**({"max_tokens": 7} | sampling))
    wanted = GenerationRequest("r", prompt, params, constraint=constraint, tools=tools)
    return request_body(wanted, model="big")


def test_a_chat_text_and_token_ids_each_go_where_they_belong():
    path, body = body_of()
    assert (path, body["messages"]) == ("chat/completions", [{"role": "user", "content": "hello"}])
    for prompt, said in (("text", "text"), ((1, 2), [1, 2]), ((), [])):
        path, body = body_of(prompt)
        assert (path, body["prompt"]) == ("completions", said)


def test_logprobs_are_asked_for_as_each_of_the_two_ways_wants_it():
    _, chat = body_of(logprobs=5)
    assert (chat["logprobs"], chat["top_logprobs"]) == (True, 5)
    _, chat = body_of(logprobs=0)
    assert chat["logprobs"] is True
    assert "top_logprobs" not in chat
    assert body_of("text", logprobs=0)[1]["logprobs"] == 0
    assert "logprobs" not in body_of()[1]


def test_what_would_change_nothing_is_not_said():
    _, body = body_of()
    extensions = {"n", "stop", "stop_token_ids", "logit_bias", "top_k", "min_p", "ignore_eos"}
    assert not (extensions | {"repetition_penalty", "tools", "response_format"}) & body.keys()
    _, body = body_of(n=2, stop=("a",), stop_token_ids=(3,), logit_bias={5: -1.0}, top_k=1)
    assert (body["n"], body["stop"], body["stop_token_ids"]) == (2, ["a"], [3])
    assert (body["logit_bias"], body["top_k"]) == ({"5": -1.0}, 1)


def test_earlier_calls_and_their_results_are_part_of_the_chat():
    talk = (
        ChatMessage("assistant", "", tool_calls=(ToolCall("c1", "clock", "{}"),)),
        ChatMessage("tool", "noon", tool_call_id="c1"),
    )
    _, body = body_of(talk)
    call, result = body["messages"]
    assert call["content"] is None
    assert call["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    ]
    assert result == {"role": "tool", "content": "noon", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("use", "choice"),
    [
        (ToolUse((CLOCK,)), "auto"),
        (ToolUse((CLOCK,), ToolChoice.NONE), "none"),
        (ToolUse((CLOCK,), ToolChoice.REQUIRED), "required"),
        (
            ToolUse((CLOCK,), ToolChoice.REQUIRED, named="clock"),
            {"type": "function", "function": {"name": "clock"}},
        ),
    ],
)
def test_tools_and_what_to_do_about_them_cross(use, choice):
    _, body = body_of(tools=use)
    (tool,) = body["tools"]
    assert tool["function"]["parameters"] == {"type": "object"}
    assert body["tool_choice"] == choice
    assert "parallel_tool_calls" not in body


def test_one_call_at_a_time_is_said_where_it_is_wanted():
    assert body_of(tools=ToolUse((CLOCK,), parallel=False))[1]["parallel_tool_calls"] is False


def test_json_is_asked_for_by_its_schema():
    _, body = body_of(constraint=Constraint(ConstraintKind.JSON_OBJECT))
    assert body["response_format"] == {"type": "json_object"}
    _, body = body_of(constraint=Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "array"}'))
    assert body["response_format"]["json_schema"]["schema"] == {"type": "array"}
    assert body["response_format"]["json_schema"]["strict"] is True


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (HELLO, {"constraint": Constraint(ConstraintKind.REGEX, "a+")}),
        (HELLO, {"constraint": Constraint(ConstraintKind.CHOICE, '["a"]')}),
        (HELLO, {"constraint": Constraint(ConstraintKind.LARK, "start: 'a'")}),
        (HELLO, {"constraint": Constraint(ConstraintKind.JSON_SCHEMA, "{")}),
        (HELLO, {"constraint": Constraint(ConstraintKind.JSON_SCHEMA, "[" * 100_000)}),
        (HELLO, {"tools": ToolUse((Tool("clock", parameters="{"),))}),
        ("text", {"constraint": Constraint(ConstraintKind.JSON_OBJECT)}),
        ("text", {"tools": ToolUse((CLOCK,))}),
    ],
)
def test_what_such_servers_do_not_do_is_refused(prompt, options):
    with pytest.raises(PromptRefused):
        body_of(prompt, **options)
