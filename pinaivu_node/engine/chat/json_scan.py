"""One JSON value, character by character: is what came so far the beginning of a value?

An answer brings a call's arguments in pieces, and each piece goes to the client at once.  What the
client has cannot be taken back, so nothing may be sent that no JSON value begins with.
"""

from __future__ import annotations

import json
import re
from enum import Enum, auto
from typing import Any, Final

MAX_DEPTH: Final = 128
"""Python's own reader gives up at about a thousand, other clients' earlier."""

_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LITERALS: Final = {"t": "true", "f": "false", "n": "null"}
_SPACE: Final = " \n\r\t"
_MAX_NUMBER: Final = 400
"""Digits of a number: more than the longest double has."""


class Malformed(Exception):
    """The text is not the beginning of what it was read as."""


def written(value: Any) -> str:
    """A value that was read, as JSON that any client can read and any pipe can carry.

    Malformed for one that JSON has no word for: `1e999` was read as infinity, a set as a set.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: UTF-8 has no bytes for it, JSON an escape
        return json.dumps(value)
    except (ValueError, TypeError, RecursionError) as exc:
        raise Malformed from exc
    return text


class _Expects(Enum):
    VALUE = auto()
    ITEM_OR_END = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    IN_STRING = auto()
    ESCAPED = auto()
    IN_NUMBER = auto()
    IN_LITERAL = auto()
    NOTHING = auto()


class JsonScanner:
    """Takes the characters of one value; raises Malformed at the first that cannot belong to it."""

    def __init__(self) -> None:
        self._expects = _Expects.VALUE
        self._closers: list[str] = []
        self._is_key = False
        self._word = ""
        """What is left of a literal or of an escape, or all of a number."""

    @property
    def done(self) -> bool:
        """Whether the value is complete."""
        return self._expects is _Expects.NOTHING

    def push(self, letter: str) -> bool:
        """Take one more; False if the value, a number, was over before it."""
        match self._expects:
            case _Expects.IN_STRING:
                self._in_string(letter)
            case _Expects.ESCAPED:
                self._escaped(letter)
            case _Expects.IN_NUMBER if letter in "0123456789+-.eE":
                self._word += letter
                _need(len(self._word) <= _MAX_NUMBER)
            case _Expects.IN_NUMBER:
                _need(_NUMBER.fullmatch(self._word) is not None)
                self._value_ends()
                return not self.done and self.push(letter)
            case _Expects.IN_LITERAL:
                self._literal(letter)
            case _:
                self._between(letter)
        return True

    def _between(self, letter: str) -> None:
        if letter in _SPACE and self._expects is not _Expects.NOTHING:
            return
        match self._expects:
            case _Expects.VALUE:
                self._value(letter)
            case _Expects.ITEM_OR_END if letter != "]":
                self._value(letter)
            case _Expects.KEY_OR_END | _Expects.KEY if letter == '"':
                self._expects, self._is_key = _Expects.IN_STRING, True
            case _Expects.COLON if letter == ":":
                self._expects = _Expects.VALUE
            case _Expects.COMMA_OR_END if letter == ",":
                self._expects = _Expects.KEY if self._closers[-1] == "}" else _Expects.VALUE
            case _Expects.ITEM_OR_END | _Expects.KEY_OR_END | _Expects.COMMA_OR_END:
                _need(letter == self._closers.pop())
                self._value_ends()
            case _:
                raise Malformed

    def _value(self, letter: str) -> None:
        if letter == '"':
            self._expects, self._is_key = _Expects.IN_STRING, False
        elif letter in "{[":
            self._expects = _Expects.KEY_OR_END if letter == "{" else _Expects.ITEM_OR_END
            self._closers.append("}" if letter == "{" else "]")
            _need(len(self._closers) <= MAX_DEPTH)
        elif letter in "-0123456789":
            self._expects, self._word = _Expects.IN_NUMBER, letter
        elif letter in _LITERALS:
            self._expects, self._word = _Expects.IN_LITERAL, _LITERALS[letter][1:]
        else:
            raise Malformed

    def _in_string(self, letter: str) -> None:
        if letter == '"':
            if self._is_key:
                self._expects = _Expects.COLON
            else:
                self._value_ends()
        elif letter == "\\":
            self._expects, self._word = _Expects.ESCAPED, ""
        else:
            _need(letter >= " ")

    def _escaped(self, letter: str) -> None:
        if self._word:
            _need(letter in "0123456789abcdefABCDEF")
            self._word = self._word[1:]
        else:
            _need(letter in '"\\/bfnrtu')
            self._word = "hhhh" if letter == "u" else ""
        if not self._word:
            self._expects = _Expects.IN_STRING

    def _literal(self, letter: str) -> None:
        _need(letter == self._word[0])
        self._word = self._word[1:]
        if not self._word:
            self._value_ends()

    def _value_ends(self) -> None:
        self._expects = _Expects.COMMA_OR_END if self._closers else _Expects.NOTHING


def _need(holds: bool) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise Malformed
