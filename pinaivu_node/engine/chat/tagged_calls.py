"""Calls in tags, as Qwen's coders write them: each argument between tags of its own, as plain text.

    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>

What a value is only the tool's schema says, so a call is told when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from pinaivu_node.engine.chat.call_syntax import Read, Sink, literal, need, solid, until
from pinaivu_node.engine.chat.json_scan import written

_MAX_VALUE: Final = 1 << 16
"""Characters of one argument, a file of source code say."""


def tagged(sink: Sink) -> Read[None]:
    """One function, up to the closing mark of the call."""
    need((yield from solid()) == "<")
    yield from literal("function=")
    name, _ = yield from until(">")
    name = name.strip()
    need(sink.knows(name))
    properties = _properties(sink.schema(name))
    arguments: dict[str, Any] = {}
    while True:
        need((yield from solid()) == "<")
        tag, _ = yield from until(">")
        if tag == "/function":
            break
        need(tag.startswith("parameter="))
        key = tag.removeprefix("parameter=").strip()
        text, _ = yield from until("</parameter>", most=_MAX_VALUE)
        arguments[key] = _value(text.removeprefix("\n").removesuffix("\n"), properties.get(key))
    whole = written(arguments)
    sink.begin(name)
    sink.arguments(whole)
    sink.end()
    need((yield from solid()) == "<")
    yield from literal("/tool_call>")


def is_text(schema: object) -> bool:
    """Whether a value is written without quotes: it is a string, or nothing says what it is."""
    if not isinstance(schema, dict):
        return True
    kinds = schema.get("type")
    if kinds is not None:
        return kinds == "string" or (isinstance(kinds, list) and "string" in kinds)
    enum = schema.get("enum")
    if isinstance(enum, list):
        return all(isinstance(choice, str) for choice in enum)
    return not {"$ref", "allOf", "anyOf", "const", "oneOf"} & schema.keys()


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}


def _value(text: str, schema: object) -> Any:
    if is_text(schema):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
