"""Grammars of tool calls, in llguidance's dialect of Lark.

The arguments of each call are of its tool's own schema, which stays a document of its own within
the grammar, so that its references hold.  What is between is written exactly as the model's family
writes it: fewer choices, fewer steps astray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pinaivu_node.engine.chat.tagged_calls import is_text
from pinaivu_node.engine.types import Constraint, ConstraintKind, Tool, ToolChoice, ToolUse

_GUIDANCE: Final = {
    # What a grammar cannot say ("not", an unknown format) is left to the model.
    "lenient": True,
    # A small model may write spaces for ever; sixteen indent eight levels.
    "whitespace_pattern": r"[ \n\t]{0,16}",
}
_WORDS: Final = frozenset({"$comment", "description", "title"})
_DATA: Final = frozenset({"const", "default", "enum", "examples"})


@dataclass(frozen=True, slots=True)
class Form:
    """The fixed parts: opener, first; head, name, middle, arguments, tail of each call; last.

    Several calls are `between` apart, where `between` holds an opener again if each has its own.
    """

    opener: str
    head: str
    middle: str
    tail: str
    between: str
    first: str = ""
    last: str = ""
    quoted: bool = True
    """Whether the name is a JSON string."""


@dataclass(frozen=True, slots=True)
class PythonForm:
    """`[f(a=1), g()]`, with the values as JSON has them."""

    opener: str = ""
    last: str = ""


@dataclass(frozen=True, slots=True)
class TaggedForm(Form):
    """A form in which each argument stands between tags, strings without quotes."""


AnyForm = Form | PythonForm


def grammar(
    form: AnyForm, use: ToolUse, *, tokens: Mapping[str, int], loose: Sequence[int] = ()
) -> Constraint | None:
    """What an answer with these tools is; None if it may be anything.

    `tokens` are marks that are one token; a grammar has to name these, as it takes none for text.
    `loose` are others of that kind, which text may hold.

    With AUTO it is text in which every opener is followed by a call.  Where calls have no opener
    of their own, any text might still become one, and nothing is enforced.
    """
    if use.choice is ToolChoice.AUTO and not form.opener:
        return None
    tools = [tool for tool in use.tools if use.named in (None, tool.name)]
    lark = _Lark(tokens)
    if isinstance(form, PythonForm):
        calls = lark.python_calls(form, tools, parallel=use.parallel)
    else:
        calls = lark.calls(form, tools, parallel=use.parallel)
    if use.choice is ToolChoice.AUTO:
        lark.text_with(form.opener, calls, many=use.parallel, loose=loose)
    else:
        lark.rule("start", lark.fixed(form.opener), calls)
    return Constraint(ConstraintKind.LARK, "\n".join(lark.rules) + "\n")


class _Lark:
    """Rules in the making."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self.rules = ["%llguidance {}"]
        self._tokens = tokens
        marks = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        self._marks = re.compile(f"({marks or '(?!)'})")

    def rule(self, name: str, *parts: str) -> str:
        self.rules.append(f"{name}: " + (" ".join(part for part in parts if part) or '""'))
        return name

    def fixed(self, text: str) -> str:
        """Exactly this, special tokens as the tokens that they are."""
        pieces = (piece for piece in self._marks.split(text) if piece)
        return " ".join(
            f"<[{self._tokens[piece]}]>" if piece in self._tokens else _quoted(piece)
            for piece in pieces
        )

    def text_with(self, opener: str, calls: str, *, many: bool, loose: Sequence[int]) -> None:
        """Any text, in it calls after openers."""
        self.rules.append(r"TEXT: /(.|\n)*/")
        if opener in self._tokens:
            self.rule("found", f"TEXT {self.fixed(opener)} {calls}")
        else:
            self.rules.append(f"open[lazy]: TEXT {_quoted(opener)}")
            self.rule("found", f"open {calls}")
        aside = ""
        if loose:
            aside = self.rule("aside", f"TEXT <[{','.join(map(str, loose))}]>") + "*"
        self.rule("start", aside, f"(found {aside})" + ("*" if many else "?"), "TEXT")

    def calls(self, form: Form, tools: list[Tool], *, parallel: bool) -> str:
        """Everything after the opener: one call or, if they may be parallel, more."""
        for number, tool in enumerate(tools):
            name = json.dumps(tool.name) if form.quoted else tool.name
            tagged = isinstance(form, TaggedForm)
            arguments = self._tagged(f"tool_{number}", tool) if tagged else _json(tool)
            self.rule(f"tool_{number}", self.fixed(name + form.middle), arguments)
        any_tool = "(" + " | ".join(f"tool_{number}" for number in range(len(tools))) + ")"
        call = self.rule("call", self.fixed(form.head), any_tool, self.fixed(form.tail))
        more = f"({self.fixed(form.between)} {call})*" if parallel else ""
        return self.rule("calls", self.fixed(form.first), call, more, self.fixed(form.last))

    def python_calls(self, form: PythonForm, tools: list[Tool], *, parallel: bool) -> str:
        for number, tool in enumerate(tools):
            arguments = self._keywords(f"tool_{number}", tool)
            self.rule(f"tool_{number}", _quoted(tool.name + "("), arguments, _quoted(")"))
        any_tool = "(" + " | ".join(f"tool_{number}" for number in range(len(tools))) + ")"
        call = self.rule("call", any_tool)
        more = f'(", " {call})*' if parallel else ""
        return self.rule("calls", '"["', call, more, '"]"', self.fixed(form.last))

    def _keywords(self, tool_rule: str, tool: Tool) -> str:
        """`a=…, b=…`: the required ones, then any of the others."""
        # Rules from the last keyword to the first: `first` before any was written, `more` after.
        first, more = '""', '""'
        arguments = [found for found in _arguments(tool) if found[0].isidentifier()]
        for number, (name, schema, needed) in reversed(list(enumerate(arguments))):
            here = f"{tool_rule}_{number}"
            value = self.rule(here, _quoted(name + "="), _embedded(schema))
            written_first, written_more = f"{value} {more}", f'", " {value} {more}'
            if needed:
                first = self.rule(f"{here}_first", written_first)
                more = self.rule(f"{here}_more", written_more)
            else:
                first = self.rule(f"{here}_first", f"{written_first} | {first}")
                more = self.rule(f"{here}_more", f"{written_more} | {more}")
        return first

    def _tagged(self, tool_rule: str, tool: Tool) -> str:
        """The required arguments, then any of the others, each between its tags."""
        written = []
        end = "\n</parameter>\n"
        for number, (name, schema, needed) in enumerate(_arguments(tool)):
            if {"<", ">", "\n"} & set(name):
                continue  # no tag can say it
            enum = schema.get("enum")
            if not is_text(schema):
                value = f"{_embedded(schema)} {_quoted(end)}"
            elif isinstance(enum, list) and all(isinstance(choice, str) for choice in enum):
                value = "(" + " | ".join(map(_quoted, enum)) + f") {_quoted(end)}"
            else:
                # Up to the first closing tag, wherever it is: that is what a reader does.
                text = f"{tool_rule}_{number}_text"
                self.rules.append(f'{text}[suffix="</parameter>"]: /(.|\\n)*/')
                value = f'{text} "\\n"'
            here = self.rule(f"{tool_rule}_{number}", _quoted(f"<parameter={name}>\n"), value)
            written.append(here if needed else here + "?")
        return " ".join(written)


def _arguments(tool: Tool) -> list[tuple[str, dict[str, Any], bool]]:
    """Name, schema and whether it is required; these first, else in the schema's order."""
    schema = json.loads(tool.parameters)
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return []
    required = schema.get("required")
    needed = [name for name in properties if isinstance(required, list) and name in required]
    others = [name for name in properties if name not in needed]
    return [(name, _property(schema, properties[name]), name in needed) for name in needed + others]


def _quoted(text: str) -> str:
    # Strings in Lark are those of JSON, but for DEL, which JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _json(tool: Tool) -> str:
    schema = {"type": "object"} | json.loads(tool.parameters)
    return _embedded(schema)


def _property(schema: Mapping[str, Any], value: object) -> dict[str, Any]:
    """One property's schema, with the definitions of the whole."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return (value if isinstance(value, dict) else {}) | definitions


def _embedded(schema: Mapping[str, Any]) -> str:
    bare = _without_words(schema) | {"x-guidance": _GUIDANCE}
    return "%json " + json.dumps(bare, ensure_ascii=False)


def _without_words(schema: Any) -> Any:
    """The schema without what it tells only to readers: half of many, and nothing to a grammar."""
    if isinstance(schema, dict):
        return {
            key: value if key in _DATA else _without_words(value)
            for key, value in schema.items()
            if not (key in _WORDS and isinstance(value, str))  # else it is a property of that name
        }
    return [_without_words(item) for item in schema] if isinstance(schema, list) else schema
