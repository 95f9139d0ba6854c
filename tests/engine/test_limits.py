from __future__ import annotations

import time
from dataclasses import replace

import pytest

from pinaivu_node.engine.limits import check_request
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

TOOL = Tool("f", "does it", '{"type": "object"}')
FINE = GenerationRequest("r", (ChatMessage("user", "hi"),), SamplingParams(max_tokens=5))


def sampled(**sampling):
    return replace(FINE, sampling=SamplingParams(**({"max_tokens": 5} | sampling)))


def with_tools(*tools, **use):
    return replace(FINE, tools=ToolUse(tools, **use))


@pytest.mark.parametrize(
    "request_",
    [
        FINE,
        replace(FINE, prompt="text"),
        replace(FINE, prompt=(1, 2, 99)),
        sampled(n=128, logprobs=20, stop=("x" * 1024,) * 16, logit_bias={99: -100.0}),
        with_tools(TOOL, Tool("mcp.files:read/all-now")),
        with_tools(TOOL, choice=ToolChoice.REQUIRED, named="f"),
        replace(FINE, constraint=Constraint(ConstraintKind.JSON_OBJECT), tools=ToolUse((TOOL,))),
    ],
    ids=str,
)
def test_what_is_within_bounds_is_let_in(request_):
    check_request(request_, vocabulary=100)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (sampled(n=0), "n must be 1 to 128"),
        (sampled(n=129), "n must be 1 to 128"),
        (sampled(logprobs=21), "0 to 20"),
        (sampled(logprobs=-1), "0 to 20"),
        (sampled(stop=("x",) * 17), "Too many stop strings"),
        (sampled(stop=("x" * 1025,)), "characters of a stop string"),
        (sampled(stop_token_ids=(1,) * 1025), "Too many stop tokens"),
        (sampled(stop_token_ids=(100,)), "no token 100"),
        (sampled(logit_bias={-1: 0.0}), "no token -1"),
        (sampled(logit_bias=dict.fromkeys(range(1025), 0.0)), "Too many biased tokens"),
        (sampled(logit_bias={1: float("nan")}), "A bias"),
        (sampled(temperature=float("inf")), "temperature"),
        (sampled(temperature=-0.1), "temperature"),
        (sampled(temperature="hot"), "must be numbers"),
        (sampled(temperature=None), "must be numbers"),
        (sampled(max_tokens=1.5), "max_tokens must be a whole number"),
        (sampled(top_k=True), "top_k must be a whole number"),
        (sampled(n="2"), "n must be a whole number"),
        (sampled(logprobs=1.0), "logprobs must be a whole number"),
        (sampled(stop=(b"x",)), "must be text"),
        (sampled(stop_token_ids=(1.0,)), "no token 1.0"),
        (sampled(logit_bias={"1": 0.0}), "no token '1'"),
        (sampled(logit_bias={1: "much"}), "A bias must be a number"),
        (sampled(top_p=1.1), "top_p"),
        (sampled(top_k=-1), "top_k"),
        (sampled(max_tokens=-1), "max_tokens"),
        (sampled(repetition_penalty=0.0), "repetition_penalty"),
        (replace(FINE, prompt=(1, 100)), "no token 100"),
        (replace(FINE, prompt=(1, ChatMessage("user", "x"))), "not both"),
        (replace(FINE, prompt=(ChatMessage("root", "x"),)), "no role 'root'"),
        (replace(FINE, prompt=(ChatMessage("user", "x"),) * 4097), "Too many messages"),
        (
            replace(FINE, prompt=(ChatMessage("assistant", "", (ToolCall("", "a b", "{}"),)),)),
            "no name for a tool",
        ),
        (replace(FINE, resume_token_ids=(100,)), "no token 100"),
        (replace(sampled(n=2), resume_token_ids=(1,)), "single answer"),
        (with_tools(TOOL, TOOL), "one name"),
        (with_tools(Tool('f"}')), "no name for a tool"),
        (with_tools(Tool("")), "no name for a tool"),
        (with_tools(Tool("f\n")), "no name for a tool"),
        (with_tools(Tool("f", "", "[]")), "no JSON schema"),
        (with_tools(Tool("f", "", "[" * 100_000)), "no JSON schema"),
        (with_tools(Tool("f", "x" * (1 << 20))), "characters of tools"),
        (with_tools(*[Tool(f"f{i}") for i in range(129)]), "Too many tools"),
        (with_tools(choice=ToolChoice.REQUIRED), "no tools"),
        (with_tools(TOOL, choice=ToolChoice.REQUIRED, named="g"), "no tool 'g'"),
        (
            replace(
                with_tools(TOOL, choice=ToolChoice.REQUIRED),
                constraint=Constraint(ConstraintKind.JSON_OBJECT),
            ),
            "cannot both",
        ),
        (
            replace(FINE, constraint=Constraint(ConstraintKind.REGEX, "a" * (1 << 19))),
            "characters of a constraint",
        ),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_the_reason(request_, why):
    with pytest.raises(PromptRefused, match=why):
        check_request(request_, vocabulary=100)


def test_a_million_stop_strings_are_refused_at_once():
    request = sampled(stop=tuple(map(str, range(10**6))))
    begun = time.process_time()
    with pytest.raises(PromptRefused, match="Too many stop strings: 1000000"):
        check_request(request, vocabulary=100)
    assert time.process_time() - begun < 0.1
