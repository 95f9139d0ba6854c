"""A chat as a template takes it: turns of plain data, with tools where the template knows them.

Where it does not, the tools are words: the system's turn tells of them in the way of Hermes, calls
are written into the assistant's turns, and what came of them into the user's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Final

from pinaivu_node.engine.chat.chat_template import ArgumentsAs, Turn
from pinaivu_node.engine.chat.dialects import Dialect
from pinaivu_node.engine.types import ChatMessage, PromptRefused, Tool, ToolCall

Plain = Callable[[str], str]
"""Makes a client's text harmless: no mark in it is one."""

_SYSTEM_ROLES: Final = ("system", "developer")
_TOOLS_IN_WORDS: Final = """\
# Tools

You may call functions to help with the user's request. These are their signatures, one a line:
<tools>
{tools}
</tools>

For each call, write a JSON object with the function's name and its arguments, like this:
<tool_call>
{{"name": "the function's name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


class Conversation:
    """Turns and tools of one request, made harmless and ready for a template."""

    def __init__(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        *,
        dialect: Dialect,
        plain: Plain,
    ) -> None:
        """Raises PromptRefused for a tool without a schema."""
        self._dialect = dialect
        self._plain = plain
        self._names = _names_of_calls(messages)
        self._tools = [self._tool(tool) for tool in tools]
        self._turns = [self._turn(message) for message in messages]

    @property
    def tools(self) -> list[Turn]:
        """What the template is given; nothing if the tools are in the words."""
        return self._tools if self._dialect.native else []

    def turns(self) -> list[Turn]:
        """The messages as turns, instructions first."""
        turns = [dict(turn) for turn in self._turns]
        if self._tools and not self._dialect.native:
            lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in self._tools)
            # After the instructions, so that tools which change leave a prefix to share.
            turns.append({"role": "system", "content": _TOOLS_IN_WORDS.format(tools=lines)})
        return system_first(turns)

    def _tool(self, tool: Tool) -> Turn:
        try:
            parameters = json.loads(tool.parameters)
        except (ValueError, RecursionError) as exc:
            raise PromptRefused(f"The parameters of {tool.name} are no JSON.") from exc
        function = {
            "name": tool.name,
            "description": tool.description,
            "parameters": {"type": "object", "properties": {}} | _mapping(parameters),
        }
        return {"type": "function", "function": self._deep(function)}

    def _turn(self, message: ChatMessage) -> Turn:
        content = self._plain(message.content)
        if message.role == "tool":
            return self._result(message, content)
        if message.role != "assistant" or not message.tool_calls:
            return {"role": message.role, "content": content}
        if self._dialect.native:
            calls = [self._call(call) for call in message.tool_calls]
            return {"role": "assistant", "content": content, "tool_calls": calls}
        calls_in_words = [self._call_in_words(call) for call in message.tool_calls]
        return {"role": "assistant", "content": "\n".join(filter(None, [content, *calls_in_words]))}

    def _result(self, message: ChatMessage, content: str) -> Turn:
        if not self._dialect.native:
            in_words = f"<tool_response>\n{content}\n</tool_response>"
            return {"role": "user", "content": in_words}
        return {
            "role": "tool",
            "name": self._plain(self._names.get(message.tool_call_id, "tool")),
            "tool_call_id": _short_id(message.tool_call_id),
            "content": content,
        }

    def _call(self, call: ToolCall) -> Turn:
        as_text = self._dialect.arguments_as is ArgumentsAs.TEXT
        arguments: object = call.arguments if as_text else _parsed(call.arguments)
        function = {"name": call.name, "arguments": arguments}
        return {"id": _short_id(call.id), "type": "function", "function": self._deep(function)}

    def _call_in_words(self, call: ToolCall) -> str:
        arguments = self._deep(_parsed(call.arguments))
        written = json.dumps({"name": call.name, "arguments": arguments}, ensure_ascii=False)
        return f"<tool_call>\n{self._plain(written)}\n</tool_call>"

    def _deep(self, value: Any) -> Any:
        if isinstance(value, str):
            # JSON can say half a surrogate pair, and no tokenizer can read one.
            return self._plain(value.encode(errors="replace").decode())
        if isinstance(value, dict):
            return {self._deep(key): self._deep(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._deep(item) for item in value]
        return value


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PromptRefused("The parameters of a tool are no JSON schema.")
    return value


def _parsed(arguments: str) -> dict[str, Any]:
    """The arguments; if a model once wrote them wrong, an object that says so."""
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {"malformed": arguments}


def _names_of_calls(messages: Sequence[ChatMessage]) -> dict[str, str]:
    return {call.id: call.name for message in messages for call in message.tool_calls}


def _short_id(call_id: str) -> str:
    """Nine letters and digits: some templates refuse any other id, none minds these."""
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]


def system_first(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with all instructions (system, developer) merged into one turn at the start.

    Templates take one system turn and only there; some drop the others without a word.
    """
    system = [turn["content"] for turn in turns if turn["role"] in _SYSTEM_ROLES]
    rest = [turn for turn in turns if turn["role"] not in _SYSTEM_ROLES]
    return [{"role": "system", "content": "\n\n".join(system)}, *rest] if system else rest


def alternating(turns: Sequence[Turn]) -> list[Turn]:
    """The same conversation for a strict template: instructions folded into the first user turn,
    neighbouring turns of one role joined where they are nothing but text.
    """
    as_user = [turn | {"role": "user"} if turn["role"] == "system" else turn for turn in turns]
    joined: list[Turn] = []
    for (role, is_text), group in groupby(as_user, key=_kind):
        if is_text:
            content = "\n\n".join(turn["content"] for turn in group)
            joined.append({"role": role, "content": content})
        else:
            joined += group
    return joined


def _kind(turn: Turn) -> tuple[str, bool]:
    return turn["role"], turn.keys() <= {"role", "content"}
