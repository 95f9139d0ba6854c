"""What to post to an OpenAI-compatible server for a request of ours: pure translation.

OpenAI's own fields are always sent, other servers' extensions only where they would do something.
What no field can say, or only one that many servers ignore without a word, is refused: a constraint
that is not kept would be found out by the client, or by nobody.
"""

from __future__ import annotations

import json
from typing import Any, Final

from pinaivu_node.engine.types import (
    ChatMessage,
    Constraint,
    ConstraintKind,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
    ToolChoice,
    ToolUse,
)

_SEED_MASK: Final = 2**31 - 1
"""Servers differ in the width of a seed; this much all of them take."""


def request_body(request: GenerationRequest, *, model: str) -> tuple[str, dict[str, Any]]:
    """Where to post a request, and what; PromptRefused for what such servers do not do."""
    if request.resume_token_ids:
        raise PromptRefused("This engine cannot continue an answer begun elsewhere.")
    prompt = request.prompt
    body = {
        "model": model,
        "stream": True,
        # Servers that do not know the second option ignore it; those that do count as they go.
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **_sampling(request.sampling),
    }
    if isinstance(prompt, tuple) and prompt and isinstance(prompt[0], ChatMessage):
        turns = [_message(turn) for turn in prompt]
        return "chat/completions", body | {"messages": turns} | _chat_options(request)
    if request.constraint is not None or request.tools is not None:
        raise PromptRefused("This engine knows constraints and tools in chats only.")
    if request.sampling.logprobs is not None:
        body["logprobs"] = request.sampling.logprobs
    return "completions", body | {"prompt": prompt if isinstance(prompt, str) else list(prompt)}


def _message(turn: ChatMessage) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.tool_calls:
        message["content"] = turn.content or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in turn.tool_calls
        ]
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


def _chat_options(request: GenerationRequest) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if request.sampling.logprobs is not None:
        options["logprobs"] = True
        if request.sampling.logprobs:
            options["top_logprobs"] = request.sampling.logprobs
    if request.constraint is not None:
        options["response_format"] = _response_format(request.constraint)
    if request.tools is not None:
        options |= _tools(request.tools)
    return options


def _response_format(constraint: Constraint) -> dict[str, Any]:
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            return {"type": "json_object"}
        case ConstraintKind.JSON_SCHEMA:
            schema = _json(constraint.text, what="schema of the answer")
            described = {"name": "answer", "schema": schema, "strict": True}
            return {"type": "json_schema", "json_schema": described}
        case ConstraintKind.REGEX | ConstraintKind.CHOICE | ConstraintKind.LARK:
            raise PromptRefused(f"This engine cannot enforce a {constraint.kind.value} constraint.")


def _tools(use: ToolUse) -> dict[str, Any]:
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": _json(tool.parameters, what=f"parameters of tool {tool.name}"),
            },
        }
        for tool in use.tools
    ]
    choice: Any = use.choice.value
    if use.choice is ToolChoice.REQUIRED and use.named is not None:
        choice = {"type": "function", "function": {"name": use.named}}
    fields = {"tools": tools, "tool_choice": choice}
    return fields if use.parallel else fields | {"parallel_tool_calls": False}


def _json(text: str, *, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise PromptRefused(f"The {what} is no JSON.") from exc


def _sampling(sampling: SamplingParams) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed & _SEED_MASK,
    }
    optional: dict[str, Any] = {
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()},
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "ignore_eos": sampling.ignore_eos,
    }
    if sampling.repetition_penalty != 1.0:
        optional["repetition_penalty"] = sampling.repetition_penalty
    if sampling.n != 1:
        optional["n"] = sampling.n
    return fields | {name: value for name, value in optional.items() if value}
