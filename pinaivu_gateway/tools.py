"""OpenAI's tools: what the model may call, what it called before, and what it calls now."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from pinaivu_gateway.errors import refusal
from pinaivu_gateway.openai_struct import Struct, schema_text, without_halves
from pinaivu_node.protocol.ids import RequestId
from pinaivu_node.protocol.inference import (
    MAX_CONSTRAINT_CHARACTERS,
    MAX_PROMPT_CHARACTERS,
    MAX_TOOLS,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    ToolUse,
)

TOKENS_PER_TOOL: Final = 64
"""A template's marks and words around a tool or a call."""
TOKENS_OF_INSTRUCTION: Final = 1024
"""What a template says about how tools are called; the longest known is a third of it."""
_NO_PARAMETERS: Final = {"type": "object", "properties": {}}
"""What OpenAI takes a tool without parameters for."""

_Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS), BeforeValidator(without_halves)]
_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(max_length=256), BeforeValidator(without_halves)]


class Function(Struct):
    """`strict` makes no difference: arguments are held to their schema in any case."""

    name: _Name
    description: Annotated[str, Field(max_length=16384), BeforeValidator(without_halves)] = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class FunctionTool(Struct):
    """The one kind of tool there is."""

    type: Literal["function"]
    function: Function


class _Called(Struct):
    name: Annotated[str, Field(min_length=1, max_length=64), BeforeValidator(without_halves)]
    arguments: _Text = ""


class MessageCall(Struct):
    """A call in an assistant's message."""

    id: CallId = ""
    type: Literal["function"] = "function"
    function: _Called


class _Named(Struct):
    name: _Name


class NamedChoice(Struct):
    """This tool and no other."""

    type: Literal["function"]
    function: _Named


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("~text")]
    | Annotated[NamedChoice, Tag("~object")],
    Discriminator(lambda value: "~object" if isinstance(value, dict) else "~text"),
]
Tools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]
MessageCalls = Annotated[list[MessageCall], Field(max_length=MAX_TOOLS)]


def tool_use_of(
    tools: Sequence[FunctionTool], choice: str | NamedChoice | None, *, parallel: bool
) -> ToolUse | None:
    """What the model is told of its tools; None if it has none.

    Raises RequestRefused: a choice among tools that are not there, or a schema that is too large.
    """
    if not tools:
        if choice in (None, "none", "auto"):
            return None
        raise _bad_choice("is only allowed when 'tools' are specified")
    named = None
    if isinstance(choice, NamedChoice):
        named, choice = choice.function.name, "required"
        if named not in {tool.function.name for tool in tools}:
            raise _bad_choice(f"names {named}, which is not among 'tools'")
    described = tuple(_wire_tool(tool.function, index) for index, tool in enumerate(tools))
    _check_size(described)
    return ToolUse(
        tools=described, choice=ToolChoice(choice or "auto"), named=named, parallel=parallel
    )


def _check_size(tools: Iterable[Tool]) -> None:
    size = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in tools)
    # All of them together are no longer than the longest schema: they are a grammar as well.
    if size > MAX_CONSTRAINT_CHARACTERS:
        raise refusal(
            f"Invalid 'tools': {size} characters are over the limit of "
            f"{MAX_CONSTRAINT_CHARACTERS}.",
            code="string_above_max_length",
            param="tools",
        )


def _bad_choice(fault: str) -> Exception:
    return refusal(f"Invalid 'tool_choice': it {fault}.", code="invalid_value", param="tool_choice")


def _wire_tool(function: Function, index: int) -> Tool:
    parameters = function.parameters or _NO_PARAMETERS
    return Tool(
        name=function.name,
        description=function.description,
        parameters=schema_text(parameters, param=f"tools[{index}].function.parameters"),
    )


def wire_calls(calls: Iterable[MessageCall]) -> tuple[ToolCall, ...]:
    """Calls of an earlier turn, as they go to the model."""
    return tuple(
        ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in calls
    )


def most_tokens_of_tools(use: ToolUse | None) -> int:
    """No template makes more tokens of these tools: spelled out with indents, each byte one."""
    if use is None:
        return 0
    return TOKENS_OF_INSTRUCTION + sum(
        TOKENS_PER_TOOL + len(json.dumps(_spelled(tool), indent=4)) for tool in use.tools
    )


def _spelled(tool: Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": json.loads(tool.parameters),
        },
    }


def most_tokens_of_calls(calls: Iterable[ToolCall]) -> int:
    """No template makes more tokens of these calls; arguments may be spelled out again, escaped."""
    return sum(
        TOKENS_PER_TOOL + len(call.id) + len(call.name) + 2 * len(json.dumps(call.arguments))
        for call in calls
    )


# --- answers --------------------------------------------------------------------------------------


class CallsSaid:
    """The calls of one answer, from their pieces."""

    def __init__(self, request_id: RequestId, *, choice: int = 0) -> None:
        self._prefix = f"call_{request_id.removeprefix('req_')}_"
        if choice:
            self._prefix += f"{choice}_"
        self._calls: dict[int, dict[str, Any]] = {}

    def deltas(self, pieces: Iterable[ToolCallDelta]) -> list[dict[str, Any]]:
        """Take in more, and give what a stream says of it: the first of a call names it."""
        said = []
        for piece in pieces:
            call = self._calls.get(piece.index)
            delta: dict[str, Any] = {"index": piece.index}
            function = {"arguments": piece.arguments}
            if call is None:
                name = piece.name or ""
                call_id = piece.id or f"{self._prefix}{piece.index}"
                named = {"name": name, "arguments": ""}
                call = {"id": call_id, "type": "function", "function": named}
                self._calls[piece.index] = call
                delta |= {"id": call_id, "type": "function"}
                function = {"name": name, **function}
            call["function"]["arguments"] += piece.arguments
            said.append({**delta, "function": function})
        return said

    def whole(self) -> list[dict[str, Any]]:
        """All calls, in their order."""
        return [call for _, call in sorted(self._calls.items())]
