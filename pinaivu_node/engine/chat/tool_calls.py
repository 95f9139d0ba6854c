"""Tool calls out of an answer's text, as it grows.

An answer is text until a mark with which the model's family opens a call; from there a reader of
`call_syntax.py` takes every character until the call is over.  What only may be the beginning of a
mark is held back.  What turns out to be no call is given back as the text that it is, so nothing an
answer says is lost; only the arguments of a call go out before its end is seen, and of these only
what some JSON object begins with.

What is told depends on the text and not on its pieces, and the ids of the calls on the request and
their places in it: an answer that is taken up elsewhere goes on with the same calls.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pinaivu_node.engine.chat.call_syntax import Read, Reader
from pinaivu_node.engine.chat.json_scan import Malformed
from pinaivu_node.engine.types import Tool, ToolCallDelta, ToolUse

_MAX_HELD: Final = 1 << 17
"""Characters of something that might be a call, before it is given back as text."""


def call_id(request_id: str, *, answer: int, call: int) -> str:
    """What the client will name this call by; the same wherever the answer is made."""
    place = f"{len(request_id)}:{request_id}:{answer}:{call}"
    return "call_" + hashlib.sha256(place.encode(errors="replace")).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class Opener:
    """A mark with which calls open."""

    text: str
    reader: Reader
    at_start: bool = False
    """Only as the first of an answer: it is too common a text elsewhere."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a piece of text brought: something to read, parts of calls, both or neither."""

    text: str = ""
    deltas: tuple[ToolCallDelta, ...] = ()


@dataclass(slots=True)
class _Calls:
    """The sink of the readers: counts the calls and keeps what is to be told."""

    tools: Mapping[str, Tool]
    request_id: str
    answer: int
    most: int | None
    count: int = 0
    whole: int = 0
    told: bool = False
    """Whether the last character was part of what was told."""
    _pending: list[ToolCallDelta] = field(default_factory=list)
    _pieces: list[str] = field(default_factory=list)

    def knows(self, name: str) -> bool:
        return name in self.tools

    def schema(self, name: str) -> Mapping[str, Any]:
        parsed = json.loads(self.tools[name].parameters)
        return parsed if isinstance(parsed, dict) else {}

    def begin(self, name: str) -> None:
        if not self.knows(name) or self.count == self.most:
            raise Malformed
        self._join()
        number = call_id(self.request_id, answer=self.answer, call=self.count)
        self._pending.append(ToolCallDelta(self.count, number, name))
        self.count += 1
        self.told = True

    def arguments(self, piece: str) -> None:
        self._pieces.append(piece)
        self.told = True

    def end(self) -> None:
        self.whole += 1
        self.told = True

    def take(self) -> tuple[ToolCallDelta, ...]:
        self._join()
        taken, self._pending = tuple(self._pending), []
        return taken

    def _join(self) -> None:
        """Add the pieces to the call they belong to, in one delta."""
        if self._pieces:
            piece = "".join(self._pieces)
            self._pieces.clear()
            self._pending.append(ToolCallDelta(self.count - 1, arguments=piece))


class ToolCallParser:
    """The calls and the text of one answer."""

    def __init__(
        self,
        openers: Sequence[Opener],
        *,
        hidden: Sequence[str] = (),
        tools: ToolUse,
        request_id: str,
        answer: int,
    ) -> None:
        """`hidden` are marks that are not shown, opener or not: the model's special tokens.

        What calls none of the tools, or one more than may be called, is no call but text.
        """
        self._openers = {opener.text: opener for opener in openers}
        self._hidden = frozenset(hidden)
        self._hidden_marks = _pattern(hidden)
        self._marks = _pattern([o.text for o in openers if not o.at_start] + list(hidden))
        self._first = _pattern([o.text for o in openers if o.at_start])
        self._beginnings = frozenset(
            mark[:length] for mark in {*self._openers, *hidden} for length in range(1, len(mark))
        )
        self._longest = max(map(len, self._beginnings), default=0)
        by_name = {tool.name: tool for tool in tools.tools}
        self._calls = _Calls(by_name, request_id, answer, most=None if tools.parallel else 1)
        self._held = ""
        """Outside of a call: what may be the beginning of one.  Inside: what was not told yet."""
        self._body: Read[None] | None = None
        self._begun = False
        """Whether anything of the answer was shown or told."""
        self._shown: list[str] = []

    @property
    def whole_calls(self) -> int:
        """How many calls are complete."""
        return self._calls.whole

    def push(self, text: str) -> Parsed:
        """What this piece of the answer brings."""
        while text:
            body = self._body
            text = self._outside(text) if body is None else self._inside(text, body)
        return self._parsed()

    def finish(self) -> Parsed:
        """What was held back, when the answer is over.

        After a whole call, space and the beginning of its closing mark are nothing to read.
        """
        held, self._held = self._held, ""
        in_vain = self._body is not None and self._calls.whole and "{" not in held
        if not in_vain and not (self._calls.count and held.isspace()):
            self._show(self._hidden_marks.sub("", held))
        self._body = None
        return self._parsed()

    def _parsed(self) -> Parsed:
        shown = "".join(self._shown)
        self._shown.clear()
        return Parsed(shown, self._calls.take())

    def _show(self, text: str) -> None:
        self._begun = self._begun or bool(text)
        self._shown.append(text)

    def _outside(self, text: str) -> str:
        """Show what is before the next mark; returns what comes after the mark."""
        self._held += text
        mark = self._marks.search(self._held)
        if not self._begun:
            mark = self._first.match(self._held, len(self._held) - len(self._held.lstrip())) or mark
        if mark is None:
            self._show_what_is_surely_text()
            return ""
        held, self._held = self._held, ""
        opener = self._openers.get(mark[0])
        if opener is None:
            self._show(held[: mark.start()])
            return held[mark.end() :]
        before = held[: mark.start()].rstrip()  # the space before a call is nobody's to read
        self._show(before)
        self._body = opener.reader(self._calls)
        next(self._body)
        self._held = held[len(before) : mark.start() if mark[0] in self._hidden else mark.end()]
        return held[mark.end() :]

    def _show_what_is_surely_text(self) -> None:
        length = self._beginning_at_the_end(self._held)
        cut = len(self._held[: len(self._held) - length].rstrip())
        self._show(self._held[:cut])
        self._held = self._held[cut:]

    def _inside(self, text: str, body: Read[None]) -> str:
        """Give the reader its characters; returns those after the call."""
        for at, letter in enumerate(text):
            self._held += letter
            self._calls.told = False
            try:
                self._bounded()
                body.send(letter)
            except StopIteration:
                self._body, self._held, self._begun = None, "", True
                return text[at + 1 :]
            except Malformed:
                return self._given_up() + text[at + 1 :]
            if self._calls.told:
                self._held, self._begun = "", True
        return ""

    def _given_up(self) -> str:
        """Show what was held as the text that it is; returns its end that may yet open a call."""
        held, self._held, self._body = self._held, "", None
        cut = len(held) - self._beginning_at_the_end(held[1:])
        self._show(self._hidden_marks.sub("", held[:cut]))
        self._begun = True
        return held[cut:]

    def _beginning_at_the_end(self, text: str) -> int:
        """How many characters at the end of the text a mark may begin with."""
        end = text[-self._longest :] if self._longest else ""
        return next((n for n in range(len(end), 0, -1) if end[-n:] in self._beginnings), 0)

    def _bounded(self) -> None:
        if len(self._held) > _MAX_HELD:
            raise Malformed


def _pattern(marks: Sequence[str]) -> re.Pattern[str]:
    """Any of the marks; nothing if there are none."""
    longest_first = sorted(set(marks), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
