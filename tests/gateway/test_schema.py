"""OpenAI's requests: what is taken, what is refused, and how the refusal is worded."""

from __future__ import annotations

import json
from typing import Any

import pytest
from counting_market import MODEL, PROVIDERS
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_gateway.errors import RequestRefused
from pinaivu_gateway.openai_schema import ChatRequest, CompletionRequest, parse_untrusted

USER = {"role": "user", "content": "Hi"}
PEER = PROVIDERS[0].peer_id


def chat(**fields: Any) -> ChatRequest:
    body = {"model": MODEL, "messages": [USER], **fields}
    return parse_untrusted(json.dumps(body).encode(), ChatRequest)


def completion(**fields: Any) -> CompletionRequest:
    body = {"model": MODEL, "prompt": "Hi", **fields}
    return parse_untrusted(json.dumps(body).encode(), CompletionRequest)


def image(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "a"}, fields]}


TAKEN: list[dict[str, Any]] = [
    {},
    dict.fromkeys(("temperature", "top_p", "n", "stop", "seed", "stream", "tools")),
    dict.fromkeys(("provider", "logit_bias", "max_tokens", "user", "metadata", "audio")),
    {"temperature": 0},
    {"temperature": 2.0, "top_p": 0, "frequency_penalty": -2, "presence_penalty": 2},
    {"max_tokens": 1, "max_completion_tokens": 10**9},
    {"seed": -(2**63)},
    {"stop": []},
    {"stop": ["a", "b", "c", "d"]},
    {"n": 1, "logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "none"},
    {"logprobs": True, "top_logprobs": 20},
    {"tools": [{"type": "function", "function": {"name": "a"}}], "tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "a"}}, "tools": None},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": None}}},
    {"response_format": {"type": "text"}, "modalities": ["text"], "parallel_tool_calls": True},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"user": "u", "service_tier": "auto", "store": True, "metadata": {"a": "b"}},
    {"reasoning_effort": "low", "verbosity": "high", "prompt_cache_key": "k"},
    {"chat_template_kwargs": {"x": 1}, "keep_alive": -1, "top_k": -1, "unheard_of": [None]},
    {"logit_bias": {"5": -100, "50256": 0.5}},
    {"provider": {"sort": "price", "allow": [PEER], "deny": []}},
    {"provider": {"max_price": {"prompt": 0.1, "completion": "0.2"}}},
    {"messages": [{"role": "developer", "content": "x", "name": "n"}, USER]},
    {"messages": [USER, {"role": "assistant", "content": None, "refusal": "No."}, USER]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    {"messages": [{**USER, "annotations": [], "reasoning_content": None}]},
]


@pytest.mark.parametrize("fields", TAKEN, ids=lambda each: ",".join(each)[:60])
def test_what_clients_send_is_taken(fields):
    chat(**fields)


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": None}, "missing_required_parameter", "model"),
    ({"model": 5}, "invalid_type", "model"),
    ({"model": ""}, "invalid_value", "model"),
    ({"model": "gpt 4"}, "model_not_found", "model"),
    ({"messages": None}, "missing_required_parameter", "messages"),
    ({"messages": []}, "empty_array", "messages"),
    ({"messages": "hi"}, "invalid_type", "messages"),
    ({"messages": [USER] * 4097}, "array_above_max_length", "messages"),
    ({"messages": [5]}, "invalid_type", "messages[0]"),
    ({"messages": [USER, {"content": "x"}]}, "missing_required_parameter", "messages[1].role"),
    ({"messages": [{**USER, "role": "robot"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{**USER, "content": 5}]}, "invalid_type", "messages[0].content"),
    ({"messages": [{**USER, "content": []}]}, "empty_array", "messages[0].content"),
    (
        {"messages": [image(type="text")]},
        "missing_required_parameter",
        "messages[0].content[1].text",
    ),
    ({"messages": [image(type=5)]}, "invalid_type", "messages[0].content[1].type"),
    ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
    ({"temperature": -1}, "integer_below_min_value", "temperature"),
    ({"temperature": True}, "invalid_type", "temperature"),
    ({"temperature": "1"}, "invalid_type", "temperature"),
    ({"temperature": 10**400}, "invalid_type", "temperature"),
    ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    ({"max_tokens": True}, "invalid_type", "max_tokens"),
    ({"max_completion_tokens": 1.5}, "invalid_type", "max_completion_tokens"),
    ({"seed": 2**63}, "integer_above_max_value", "seed"),
    ({"stop": ["a"] * 5}, "array_above_max_length", "stop"),
    ({"stop": [""]}, "invalid_value", "stop[0]"),
    ({"stop": {"a": 1}}, "invalid_type", "stop"),
    ({"stream": "true"}, "invalid_type", "stream"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"5": 101}}, "integer_above_max_value", "logit_bias[5]"),
    ({"logit_bias": [1]}, "invalid_type", "logit_bias"),
    ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
    ({"user": 5}, "invalid_type", "user"),
    ({"n": 129}, "integer_above_max_value", "n"),
    ({"n": 0}, "integer_below_min_value", "n"),
    ({"logprobs": 1}, "invalid_type", "logprobs"),
    ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
    ({"tools": [{"type": "custom"}]}, "invalid_value", "tools[0].type"),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "invalid_value",
        "tools[0].function.name",
    ),
    ({"tool_choice": "maybe"}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "missing_required_parameter", "tool_choice.function"),
    ({"functions": [{}]}, "unsupported_parameter", "functions"),
    ({"response_format": "json"}, "invalid_type", "response_format"),
    ({"response_format": {}}, "invalid_value", "response_format"),
    ({"response_format": {"type": "xml"}}, "invalid_value", "response_format"),
    (
        {"response_format": {"type": "json_schema"}},
        "missing_required_parameter",
        "response_format.json_schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
        "invalid_value",
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}},
        "invalid_type",
        "response_format.json_schema.schema",
    ),
    ({"modalities": ["text", "audio"]}, "unsupported_value", "modalities"),
    ({"audio": {}}, "unsupported_parameter", "audio"),
    ({"prediction": {}}, "unsupported_parameter", "prediction"),
    ({"web_search_options": {}}, "unsupported_parameter", "web_search_options"),
    ({"provider": []}, "invalid_type", "provider"),
    ({"provider": {"sort": "throughput"}}, "invalid_value", "provider.sort"),
    ({"provider": {"only": ["x"]}}, "unknown_parameter", "provider.only"),
    ({"provider": {"allow": ["x"]}}, "invalid_value", "provider.allow[0]"),
    ({"provider": {"deny": [PEER] * 1025}}, "array_above_max_length", "provider.deny"),
    (
        {"provider": {"max_price": {"prompt": 1}}},
        "missing_required_parameter",
        "provider.max_price.completion",
    ),
    (
        {"provider": {"max_price": {"prompt": -1, "completion": 1}}},
        "integer_below_min_value",
        "provider.max_price.prompt",
    ),
    (
        {"provider": {"max_price": {"prompt": "1e9", "completion": 1}}},
        "invalid_value",
        "provider.max_price.prompt",
    ),
]


@pytest.mark.parametrize(("fields", "code", "param"), REFUSED)
def test_what_cannot_be_served_is_refused_by_name(fields, code, param):
    with pytest.raises(RequestRefused) as refused:
        chat(**fields)
    problem = refused.value.problem
    assert (problem.code, problem.param) == (code, param)
    assert problem.status == (404 if code == "model_not_found" else 400)
    assert "pydantic" not in problem.message
    assert "http" not in problem.message


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["Hi"]},
        {"prompt": [1, 2]},
        {"prompt": [[1, 2]]},
        {"prompt": ""},
        {"best_of": 1},
        {"best_of": 3, "n": 3},
        {"echo": True},
        {"logprobs": 0},
    ],
)
def test_a_completions_prompt_has_many_forms(fields):
    completion(**fields)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": None}, "missing_required_parameter", "prompt"),
        ({"prompt": []}, "empty_array", "prompt"),
        ({"prompt": [[]]}, "empty_array", "prompt[0]"),
        ({"prompt": 5}, "invalid_type", "prompt"),
        ({"prompt": [1, True]}, "invalid_type", "prompt[1]"),
        ({"prompt": [-1]}, "integer_below_min_value", "prompt[0]"),
        ({"prompt": [2**31]}, "integer_above_max_value", "prompt[0]"),
        ({"echo": True, "prompt": [1]}, "unsupported_value", "echo"),
        ({"echo": True, "logprobs": 0}, "unsupported_value", "echo"),
        ({"prompt": ["x"] * 33}, "array_above_max_length", "prompt"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"best_of": 2}, "unsupported_value", "best_of"),
        ({"best_of": 2, "n": 3}, "unsupported_value", "best_of"),
        ({"logprobs": 6}, "integer_above_max_value", "logprobs"),
        ({"logprobs": True}, "invalid_type", "logprobs"),
        ({"response_format": {"type": "json_object"}}, "unsupported_value", "response_format"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
    ],
)
def test_a_completion_is_refused_by_name_too(fields, code, param):
    with pytest.raises(RequestRefused) as refused:
        completion(**fields)
    assert (refused.value.problem.code, refused.value.problem.param) == (code, param)


def test_half_a_character_becomes_a_replacement_and_nul_stays():
    request = chat(messages=[{"role": "user", "content": "a\ud83d\x00😀"}])
    assert request.messages[0].content == "a\ufffd\x00😀"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda each: (
        st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=9), each, max_size=4)
    ),
    max_leaves=12,
)


@given(name=st.sampled_from([*ChatRequest.model_fields, "tools", "logprobs"]), value=JSON)
def test_whatever_a_field_holds_the_answer_is_a_request_or_a_refusal(name, value):
    try:
        chat(**{name: value})
    except RequestRefused as refused:
        json.loads(refused.problem.as_body())


@given(body=st.binary(max_size=200))
def test_whatever_the_bytes_the_answer_is_a_refusal(body):
    with pytest.raises(RequestRefused):
        parse_untrusted(body, ChatRequest)
