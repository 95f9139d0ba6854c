"""What binds a proof and a receipt to the very answer that was given, whatever its pieces were.

An answer of text alone has the digest of its text.  One with tool calls has the digest of the
text's digest and of each call's id, name and arguments, so that whoever holds the whole answer can
work it out, and pieces of any size lead to the same.  Several answers to one prompt have the digest
of their digests, in their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pinaivu_node.protocol.ids import Digest, DigestField, digest_of
from pinaivu_node.protocol.inference import MAX_ANSWERS, MAX_TOOLS, ToolCall, ToolCallDelta
from pinaivu_node.protocol.wire import Record, encode_body

if TYPE_CHECKING:
    from hashlib import _Hash


class _CallSaid(Record):
    id: str
    name: str
    arguments: DigestField


class _AnswerSaid(Record):
    text: DigestField
    calls: Annotated[tuple[_CallSaid, ...], Field(max_length=MAX_TOOLS)]


class _AnswersSaid(Record):
    answers: Annotated[tuple[DigestField, ...], Field(max_length=MAX_ANSWERS)]


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: _Hash = field(default_factory=hashlib.sha256)


class AnswersHash:
    """The digest of all answers to one prompt, which come in pieces and in any order."""

    def __init__(self, answers: int = 1) -> None:
        self._answers = [AnswerHash() for _ in range(answers)]

    def __getitem__(self, index: int) -> AnswerHash:
        return self._answers[index]

    @property
    def digest(self) -> Digest:
        """Of what came so far; of one answer, its own."""
        if len(self._answers) == 1:
            return self._answers[0].digest
        said = _AnswersSaid(answers=tuple(answer.digest for answer in self._answers))
        return digest_of(b"pinaivu/answers/1\0" + encode_body(said))


class AnswerHash:
    """The digest of an answer that comes in pieces."""

    def __init__(self) -> None:
        self._text = hashlib.sha256()
        self._calls: dict[int, _Call] = {}

    def add_text(self, text: bytes) -> None:
        """More of the text, in UTF-8."""
        self._text.update(text)

    def add_call(self, delta: ToolCallDelta) -> None:
        """A piece of a call; of its id and its name the first that is said counts."""
        call = self._calls.setdefault(delta.index, _Call())
        call.id = call.id or delta.id or ""
        call.name = call.name or delta.name or ""
        call.arguments.update(delta.arguments.encode())

    @property
    def digest(self) -> Digest:
        """Of what came so far."""
        text = _digest(self._text)
        if not self._calls:
            return text
        calls = tuple(
            _CallSaid(id=call.id, name=call.name, arguments=_digest(call.arguments))
            for _, call in sorted(self._calls.items())
        )
        said = _AnswerSaid(text=text, calls=calls)
        return digest_of(b"pinaivu/answer/1\0" + encode_body(said))


def digest_of_answer(text: str, calls: Iterable[ToolCall] = ()) -> Digest:
    """The digest of a whole answer; what a receipt says of it."""
    return digest_of_answers([(text, calls)])


def digest_of_answers(answers: Sequence[tuple[str, Iterable[ToolCall]]]) -> Digest:
    """The digest of all answers to one prompt, each its text and its tool calls."""
    hashes = AnswersHash(len(answers))
    for number, (text, calls) in enumerate(answers):
        hashes[number].add_text(text.encode())
        for index, call in enumerate(calls):
            hashes[number].add_call(
                ToolCallDelta(index=index, id=call.id, name=call.name, arguments=call.arguments)
            )
    return hashes.digest


def _digest(hashed: _Hash) -> Digest:
    return Digest("sha256:" + hashed.hexdigest())
