"""Logprobs and response formats, as an OpenAI client asks for them, through the whole network."""

from __future__ import annotations

import json

import pytest
from http_side import events_of, http_side, opened, said_over_http
from town import Town
from warm_engine import WarmEngine

from pinaivu_node.engine.types import (
    ChatMessage,
    Constraint,
    ConstraintKind,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
)

SCHEMA = {"type": "object", "properties": {"ü": {"type": "integer"}}, "required": ["ü"]}


async def test_a_client_is_told_how_likely_each_token_was(
    town: Town, tmp_path, autojump_clock
) -> None:
    market = await opened(town, WarmEngine())
    asked = {"logprobs": True, "top_logprobs": 2}
    async with http_side(market, tmp_path) as (client, (key, _)):
        whole = (await said_over_http(client, key, "Hello", **asked)).json()
        streamed = events_of(await said_over_http(client, key, "Hello", stream=True, **asked))
        plain = (await said_over_http(client, key, "Hello")).json()
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert len(logprobs["content"]) == whole["usage"]["completion_tokens"] == 20
    first = logprobs["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("x", -0.5, [120])
    assert [other["logprob"] for other in first["top_logprobs"]] == [-1.0, -2.0]
    chunks = [json.loads(each)["choices"][0]["logprobs"] for each in streamed[:-1]]
    assert sum(len(each["content"]) for each in chunks if each) == 20
    assert plain["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("wanted", "constraint"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Constraint(ConstraintKind.JSON_OBJECT)),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
            Constraint(
                ConstraintKind.JSON_SCHEMA,
                json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":")),
            ),
        ),
    ],
)
async def test_a_response_format_reaches_the_engine(
    town: Town, tmp_path, autojump_clock, wanted, constraint
) -> None:
    engine = WarmEngine()
    market = await opened(town, engine)
    async with http_side(market, tmp_path) as (client, (key, _)):
        await said_over_http(client, key, "Hello", response_format=wanted)
    [request] = engine.asked
    assert request.constraint == constraint


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


async def test_tools_are_called_streamed_or_not(town: Town, tmp_path, autojump_clock) -> None:
    engine = WarmEngine()
    engine.calls = (
        ToolCallDelta(0, "call_1", "weather", '{"ü": '),
        ToolCallDelta(0, arguments="5}"),
    )
    market = await opened(town, engine)
    asked = {"tools": [WEATHER], "tool_choice": "required"}
    async with http_side(market, tmp_path) as (client, (key, _)):
        whole = (await said_over_http(client, key, "Hello", **asked)).json()
        streamed = events_of(await said_over_http(client, key, "Hello", stream=True, **asked))
    [choice] = whole["choices"]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call == {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"ü": 5}'},
    }
    choices = [json.loads(each)["choices"][0] for each in streamed[:-1]]
    assert choices[-1]["finish_reason"] == "tool_calls"
    deltas = [piece for each in choices for piece in each["delta"].get("tool_calls", ())]
    assert deltas[0]["id"] == "call_1"
    assert "".join(each["function"]["arguments"] for each in deltas) == '{"ü": 5}'
    assert engine.asked[0].tools is not None
    assert engine.asked[0].tools.choice is ToolChoice.REQUIRED


async def test_what_was_called_is_part_of_the_next_turn(
    town: Town, tmp_path, autojump_clock
) -> None:
    engine = WarmEngine()
    market = await opened(town, engine)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]
    async with http_side(market, tmp_path) as (client, (key, _)):
        await said_over_http(client, key, messages=messages, tools=[WEATHER])
    [request] = engine.asked
    assert request.prompt == (
        ChatMessage("user", "What is the weather?"),
        ChatMessage("assistant", "", (ToolCall("c1", "weather", "{}"),)),
        ChatMessage("tool", "rain", tool_call_id="c1"),
    )
