"""How families of models write a tool call: one reader each.

A reader is a generator that is sent the characters after the mark with which a call opens, one by
one, tells a `Sink` what it finds, returns when the calls are over and raises Malformed at the first
character that cannot belong to them.  It never looks ahead: what a reader has told does not depend
on how the text was cut into pieces.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Generator, Mapping
from typing import Any, Final, Protocol, TypeVar

from pinaivu_node.engine.chat.json_scan import JsonScanner, Malformed, written

T = TypeVar("T")
Read = Generator[None, str, T]
"""Is sent characters, returns what they were."""

_SPACE: Final = " \n\r\t"
_MAX_WORD: Final = 4096
"""Characters of a name, a key or anything else that is kept until it is whole."""
_MAX_LIST: Final = 1 << 16
"""Characters of a pythonic list, which only as a whole can be read."""
_ARGUMENTS: Final = frozenset({"arguments", "parameters"})
_KEYS: Final = _ARGUMENTS | {"function", "id", "name", "type"}


class Sink(Protocol):
    """Where the parts of calls go."""

    def knows(self, name: str) -> bool:
        """Whether there is such a tool."""
        ...

    def schema(self, name: str) -> Mapping[str, Any]:
        """Of the arguments of a tool there is."""
        ...

    def begin(self, name: str) -> None:
        """A call begins; raises Malformed if there is no such tool."""
        ...

    def arguments(self, piece: str) -> None:
        """The next piece of the JSON object of its arguments."""
        ...

    def end(self) -> None:
        """The call is whole."""
        ...


Reader = Callable[[Sink], Read[None]]


def need(holds: bool) -> None:  # noqa: FBT001 - reads as a sentence
    """Raise Malformed unless it holds."""
    if not holds:
        raise Malformed


def solid() -> Read[str]:
    """The next character that is not space."""
    while (letter := (yield)) in _SPACE:
        pass
    return letter


def literal(text: str) -> Read[None]:
    """Exactly this."""
    for wanted in text:
        need((yield) == wanted)


def until(*ends: str, most: int = _MAX_WORD) -> Read[tuple[str, str]]:
    """What comes before the first of the ends, and which end it was."""
    word = ""
    while True:
        word += yield
        for end in ends:
            if word.endswith(end):
                return word.removesuffix(end), end
        need(len(word) <= most)


def _value(first: str, emit: Callable[[str], None]) -> Read[str]:
    """Hand on a JSON value; returns the first solid character after it."""
    scanner = JsonScanner()
    letter = first
    while scanner.push(letter):
        emit(letter)
        if scanner.done:
            return (yield from solid())
        letter = yield
    return (yield from solid()) if letter in _SPACE else letter


def _kept(first: str) -> Read[tuple[Any, str]]:
    """A JSON value, parsed, and the first solid character after it."""
    letters: list[str] = []

    def keep(letter: str) -> None:
        letters.append(letter)
        need(len(letters) <= _MAX_LIST)

    after = yield from _value(first, keep)
    try:
        return json.loads("".join(letters)), after
    except (ValueError, RecursionError) as exc:
        raise Malformed from exc


def _object(value: Any) -> str:
    """Arguments that came another way than as an object in its place."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as exc:
            raise Malformed from exc
    need(value is None or isinstance(value, dict))
    return written(value or {})


class _Fields:
    """Reads the fields of `{"name": …, "arguments": {…}}`, in any order."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._name: str | None = None
        self._early: str | None = None
        """Arguments that came before the name."""
        self._begun = False

    def read(self) -> Read[None]:
        """From after the first brace to the last; the sink has the whole call then."""
        yield from self._fields()
        if not self._begun:
            need(self._name is not None)
            self._sink.begin(str(self._name))
            self._sink.arguments(self._early or "{}")
        self._sink.end()

    def _fields(self) -> Read[None]:
        letter = yield from solid()
        while letter != "}":
            need(letter == '"')
            key, _ = yield from until('"')
            need((yield from solid()) == ":")
            letter = yield from self._field(key, (yield from solid()))
            if letter == ",":
                letter = yield from solid()
                need(letter == '"')
            else:
                need(letter == "}")

    def _field(self, key: str, first: str) -> Read[str]:
        need(key in _KEYS)  # an answer in JSON that is no call is noticed at its first key
        if key in _ARGUMENTS and not self._begun and self._early is None:
            return (yield from self._arguments(first))
        if key == "function" and first == "{":  # the call as the API writes it
            yield from self._fields()
            return (yield from solid())
        value, after = yield from _kept(first)
        if key in ("name", "function") and self._name is None:
            need(isinstance(value, str))
            self._name = value
        else:
            need(key in ("id", "type"))
        return after

    def _arguments(self, first: str) -> Read[str]:
        if self._name is not None and first == "{":
            self._sink.begin(self._name)
            self._begun = True
            return (yield from _value(first, self._sink.arguments))
        value, after = yield from _kept(first)
        self._early = _object(value)
        return after


def _one_or_list(sink: Sink, first: str) -> Read[None]:
    """`{…}` or `[{…}, {…}]`."""
    if first == "{":
        yield from _Fields(sink).read()
        return
    need(first == "[")
    while True:
        need((yield from solid()) == "{")
        yield from _Fields(sink).read()
        letter = yield from solid()
        if letter == "]":
            return
        need(letter == ",")


def in_tags(closer: str) -> Reader:
    """`{…}` or a list of them, up to the closing mark."""

    def read(sink: Sink) -> Read[None]:
        yield from _one_or_list(sink, (yield from solid()))
        while (letter := (yield from solid())) != closer[0]:
            yield from _one_or_list(sink, letter)
        yield from literal(closer[1:])

    return read


def bare_object(sink: Sink) -> Read[None]:
    """Llama: `{…}`, more of them after semicolons or space; its brace was the opening mark."""
    while True:
        yield from _Fields(sink).read()
        letter = yield from solid()
        if letter in ";,":
            letter = yield from solid()
        need(letter == "{")


def after_python_tag(sink: Sink) -> Read[None]:
    """Llama's other way: the same after a special token."""
    need((yield from solid()) == "{")
    yield from bare_object(sink)


def list_of_objects(sink: Sink) -> Read[None]:
    """`[{…}]`, its bracket being the end of the opening mark."""
    yield from _one_or_list(sink, "[")


def mistral(sink: Sink) -> Read[None]:
    """`[{…}]` as old models write it; `name[ARGS]{…}` as newer ones do, some with a call id."""
    letter = yield from solid()
    if letter in "[{":
        yield from _one_or_list(sink, letter)
        return
    name, end = yield from until("[CALL_ID]", "[ARGS]", "{")
    name = (letter + name).strip()
    if end == "[CALL_ID]":
        _, end = yield from until("[ARGS]")
    need(end == "{" or (yield from solid()) == "{")
    sink.begin(name)
    yield from _exactly("{", sink)
    sink.end()


def _exactly(first: str, sink: Sink) -> Read[None]:
    """A JSON object as arguments, and not one character more."""
    scanner = JsonScanner()
    letter = first
    while True:
        scanner.push(letter)
        sink.arguments(letter)
        if scanner.done:
            return
        letter = yield


def deepseek_mark(words: str) -> str:
    """`<|words|>` with the wide bars and low lines of DeepSeek's vocabulary."""
    return "<\uff5c" + words.replace(" ", "\u2581") + "\uff5c>"


_CALL_BEGIN: Final = deepseek_mark("tool call begin")
_CALL_END: Final = deepseek_mark("tool call end")
_CALLS_END: Final = deepseek_mark("tool calls end")
_SEPARATOR: Final = deepseek_mark("tool sep")
_ANY_CALL: Final = _CALL_END[: _CALL_END.index("call") + len("call")]
"""What `tool call begin` and `tool calls end` begin with."""


def deepseek(sink: Sink) -> Read[None]:
    """Name and object with marks between; R1 and V3 put the object into a fence."""
    need((yield from solid()) == _CALL_BEGIN[0])
    yield from literal(_CALL_BEGIN[1:])
    while True:
        name, _ = yield from until(_SEPARATOR)
        letter = yield from solid()
        fenced = letter != "{"
        if fenced:
            rest, _ = yield from until("\n")
            name = letter + rest
            yield from literal("```json")
            need((yield from solid()) == "{")
        sink.begin(name.strip())
        yield from _exactly("{", sink)
        sink.end()
        letter = yield from solid()
        if fenced:
            need(letter == "`")
            yield from literal("``")
            letter = yield from solid()
        need(letter == _CALL_END[0])
        yield from literal(_CALL_END[1:])
        need((yield from solid()) == "<")
        yield from literal(_ANY_CALL[1:])
        if (yield) == "s":
            yield from literal(_CALLS_END[len(_ANY_CALL) + 1 :])
            return
        yield from literal(_CALL_BEGIN[len(_ANY_CALL) + 1 :])


def pythonic(sink: Sink) -> Read[None]:
    """`[f(a=1), g(b="x")]`, its bracket being the end of the opening mark.

    Python has no prefix that is worth sending, so the calls come when the list is whole.
    """
    text, quote, depth = "[", "", 1
    while depth:
        letter = yield
        text += letter
        need(len(text) <= _MAX_LIST)
        if quote:
            if letter == "\\":
                text += yield
            elif letter == quote:
                quote = ""
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[({") - (letter in "])}")
        need(quote != "" or depth < 100)
    calls = _python_calls(text)
    need(all(sink.knows(name) for name, _ in calls))
    for name, arguments in calls:
        sink.begin(name)
        sink.arguments(arguments)
        sink.end()


def pythonic_within(closer: str) -> Reader:
    """The same between marks."""

    def read(sink: Sink) -> Read[None]:
        need((yield from solid()) == "[")
        yield from pythonic(sink)
        need((yield from solid()) == closer[0])
        yield from literal(closer[1:])

    return read


def _python_calls(text: str) -> list[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "\\d" is the model's, not ours
            tree = ast.parse(text, mode="eval").body
        need(isinstance(tree, ast.List) and bool(tree.elts))
        return [_python_call(call) for call in tree.elts]  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as exc:
        raise Malformed from exc


def _python_call(call: ast.expr) -> tuple[str, str]:
    if not isinstance(call, ast.Call) or call.args:
        raise Malformed
    arguments = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise Malformed
        arguments[keyword.arg] = ast.literal_eval(_JsonNames().visit(keyword.value))
    return ast.unparse(call.func), written(arguments)


class _JsonNames(ast.NodeTransformer):
    """Models mix the languages: `true`, `false` and `null` are meant as JSON has them."""

    _values: Final = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self._values:
            raise Malformed
        return ast.copy_location(ast.Constant(self._values[node.id]), node)
