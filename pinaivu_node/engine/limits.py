"""What an engine may be asked at all: ranges, and counts small enough that no request is a burden.

Other parts bound what comes over the network; the engine's process does not rely on it.  Every
count is checked before what it counts is walked, so a request of a million stop strings costs no
more than one of none.  What depends on the model beyond the size of its vocabulary (its context
window, its template) is not decided here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Final

from pinaivu_node.engine.types import (
    ChatMessage,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
    ToolChoice,
    ToolUse,
)

MAX_ANSWERS: Final = 128
"""As in the OpenAI API; more is a second request."""
MAX_LOGPROBS: Final = 20
"""As in the OpenAI API."""
MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 1024
"""Sixteen of these cost some 20 µs per token at worst."""
MAX_STOP_TOKENS: Final = 1024
MAX_BIASES: Final = 1024
MAX_MESSAGES: Final = 4096
MAX_TOOLS: Final = 128
"""As in the OpenAI API."""
MAX_TOOL_CHARACTERS: Final = 1 << 20
"""Names, descriptions and schemas of all tools: several times any context window here."""
MAX_CALLS: Final = 128
"""In one earlier turn."""
MAX_CONSTRAINT_CHARACTERS: Final = 1 << 18

_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")
"""OpenAI's letters, and the separators with which others make names from parts."""
_WHOLE: Final = ("max_tokens", "top_k", "n", "seed", "logprobs")
_REAL: Final = (
    *("temperature", "top_p", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
_NUMBERS: Final = frozenset({int, float})
_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})


def check_request(request: GenerationRequest, *, vocabulary: int) -> None:
    """Raise PromptRefused, with what is wrong, unless every field is within its bounds."""
    _check_sampling(request.sampling, vocabulary=vocabulary)
    _check_prompt(request, vocabulary=vocabulary)
    if request.tools is not None:
        check_tools(request.tools)
    if request.constraint is not None:
        _at_most(
            len(request.constraint.text), MAX_CONSTRAINT_CHARACTERS, "characters of a constraint"
        )
        _need(
            request.tools is None or request.tools.choice is not ToolChoice.REQUIRED,
            "An answer cannot both match a constraint and be a tool call.",
        )
    _need(
        not request.resume_token_ids or request.sampling.n == 1,
        "Only a single answer can be resumed.",
    )


def _check_types(params: SamplingParams) -> None:
    """What crossed a pipe may be anything, and a wrong type would fail the step of a batch."""
    for name in _WHOLE:
        value = getattr(params, name)
        unset = name == "logprobs" and value is None
        _need(unset or type(value) is int, f"{name} must be a whole number.")
    reals = [getattr(params, name) for name in _REAL]
    _need(_NUMBERS.issuperset(map(type, reals)), f"{', '.join(_REAL)} must be numbers.")
    _need(all(isinstance(stop, str) for stop in params.stop), "A stop string must be text.")
    biases = params.logit_bias.values()
    _need(_NUMBERS.issuperset(map(type, biases)), "A bias must be a number.")


def _check_sampling(params: SamplingParams, *, vocabulary: int) -> None:
    _at_most(len(params.stop), MAX_STOPS, "stop strings")
    _at_most(len(params.stop_token_ids), MAX_STOP_TOKENS, "stop tokens")
    _at_most(len(params.logit_bias), MAX_BIASES, "biased tokens")
    _check_types(params)
    for stop in params.stop:
        _at_most(len(stop), MAX_STOP_CHARACTERS, "characters of a stop string")
    _tokens(params.stop_token_ids, vocabulary=vocabulary)
    _tokens(params.logit_bias, vocabulary=vocabulary)
    _need(params.max_tokens >= 0, "max_tokens is negative.")
    _need(1 <= params.n <= MAX_ANSWERS, f"n must be 1 to {MAX_ANSWERS}.")
    _need(
        params.logprobs is None or 0 <= params.logprobs <= MAX_LOGPROBS,
        f"The alternatives to report must be 0 to {MAX_LOGPROBS}.",
    )
    _need(params.top_k >= 0, "top_k is negative.")
    _within(params.temperature, 0, 2, "temperature")
    _within(params.top_p, 0, 1, "top_p")
    _within(params.min_p, 0, 1, "min_p")
    _within(params.presence_penalty, -2, 2, "presence_penalty")
    _within(params.frequency_penalty, -2, 2, "frequency_penalty")
    _within(params.repetition_penalty, 1e-6, 10, "repetition_penalty")
    for bias in params.logit_bias.values():
        _within(bias, -100, 100, "A bias")


def _check_prompt(request: GenerationRequest, *, vocabulary: int) -> None:
    _tokens(request.resume_token_ids, vocabulary=vocabulary)
    if isinstance(request.prompt, str):
        return
    turns = [part for part in request.prompt if isinstance(part, ChatMessage)]
    numbers = tuple(part for part in request.prompt if not isinstance(part, ChatMessage))
    _need(not turns or not numbers, "A prompt is turns or token ids, not both.")
    _tokens(numbers, vocabulary=vocabulary)
    _at_most(len(turns), MAX_MESSAGES, "messages")
    for turn in turns:
        _need(turn.role in _ROLES, f"There is no role {turn.role[:40]!r}.")
        _at_most(len(turn.tool_calls), MAX_CALLS, "tool calls in one message")
        for call in turn.tool_calls:
            _need(
                _TOOL_NAME.fullmatch(call.name) is not None,
                f"{call.name[:40]!r} is no name for a tool.",
            )


def check_tools(use: ToolUse) -> None:
    """Raise PromptRefused unless each tool has a name of its own and an object as its schema."""
    _at_most(len(use.tools), MAX_TOOLS, "tools")
    size = sum(len(tool.name + tool.description + tool.parameters) for tool in use.tools)
    _at_most(size, MAX_TOOL_CHARACTERS, "characters of tools")
    names = {tool.name for tool in use.tools}
    _need(len(names) == len(use.tools), "Two tools have one name.")
    for tool in use.tools:
        _need(
            _TOOL_NAME.fullmatch(tool.name) is not None,
            f"{tool.name[:40]!r} is no name for a tool: letters, digits, _ and -.",
        )
        _need(_is_object(tool.parameters), f"The parameters of {tool.name} are no JSON schema.")
    if use.choice is ToolChoice.REQUIRED:
        _need(bool(names), "A tool call is required, and there are no tools.")
    if use.named is not None:
        _need(use.named in names, f"There is no tool {use.named[:40]!r}.")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _need(holds: bool, otherwise: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise PromptRefused(otherwise)


def _at_most(count: int, most: int, what: str) -> None:
    _need(count <= most, f"Too many {what}: {count}; at most {most}.")


def _within(number: float, low: float, high: float, name: str) -> None:
    fits = math.isfinite(number) and low <= number <= high
    _need(fits, f"{name} must be {low:g} to {high:g}.")


def _tokens(numbers: Iterable[int], *, vocabulary: int) -> None:
    for number in numbers:
        if type(number) is not int or not 0 <= number < vocabulary:
            raise PromptRefused(f"There is no token {number!r}; the vocabulary has {vocabulary}.")
