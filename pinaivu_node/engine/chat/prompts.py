"""Prompts to token ids: the model's own chat template, and no way for a user to forge its marks.

A template writes the turns of a chat as text with special tokens between them (`<|im_end|>`).  A
user who types such a mark must not end her turn and begin the system's; nor may a tool's
description, a call's arguments or what a tool gave back.  So before rendering, each mark in a
client's text is replaced by a word nobody can guess; after rendering, the text is split at these
words, and in their places the mark is tokenised as the ordinary characters that it is.  A prompt
without forged marks is tokenised in one piece, exactly as the model's authors do it.

Marks that are words to the tokenizer too (`</tools>`) cannot be told from typed ones; where tools
are in play, a typed one gets a backslash, which JSON reads as nothing and a template as no mark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from pinaivu_node.engine.chat.chat_template import TEMPLATE_FAULTS, ChatTemplate, Turn
from pinaivu_node.engine.chat.conversation import Conversation, alternating
from pinaivu_node.engine.chat.dialects import dialect_of
from pinaivu_node.engine.types import ChatMessage, PromptRefused, ToolUse

_THINKING: Final = frozenset({"<think>", "</think>"})
"""Templates look for these in earlier answers, to leave the thoughts out."""
_TAGS_IN_WORDS: Final = frozenset({"</tools>", "</tool_call>", "</tool_response>"})
_NOTHING: Final = re.compile("(?!)")
_CLOSING_TAG: Final = re.compile(r"</([A-Za-z_]+)>")
_MAX_FORGED: Final = 4096
"""Marks in one client's text: each is tokenised by itself, so many in half a second."""

Prompt = tuple[ChatMessage, ...] | str | tuple[int, ...]
_Tree: TypeAlias = "dict[str, _Tree]"


@dataclass(slots=True)
class _Disarmed:
    """The marks that were taken out of one request, and the words in their places."""

    word: str
    marks: re.Pattern[str]
    tags: re.Pattern[str]
    forged: list[str] = field(default_factory=list)

    def plain(self, text: str) -> str:
        return self.marks.sub(self._replaced, self.tags.sub(_with_backslash, text))

    def _replaced(self, found: re.Match[str]) -> str:
        if len(self.forged) >= _MAX_FORGED:
            raise PromptRefused(f"Over {_MAX_FORGED} of the model's marks are in these messages.")
        self.forged.append(found[0])
        return f"{self.word}x{len(self.forged) - 1}x"

    def pieces(self, rendered: str) -> list[str]:
        """Text, number of a forged mark, text and so on."""
        return re.split(f"{self.word}x([0-9]+)x", rendered) if self.forged else [rendered]


class PromptEncoder:
    """Token ids of a prompt, for one tokenizer.  Not for two threads at once."""

    def __init__(
        self, tokenizer: Any, *, random_word: Callable[[], str], max_tokens: int | None = None
    ) -> None:
        """`random_word` draws letters and digits that no client can guess.

        With `max_tokens`, a text that cannot be so few tokens is refused before it is tokenised,
        which for the largest texts takes seconds.
        """
        self._tokenizer = tokenizer
        self._random_word = random_word
        self._max_characters = (
            None if max_tokens is None else max_tokens * max(map(len, tokenizer.get_vocab()))
        )
        self._template = ChatTemplate(tokenizer)
        self.dialect: Final = dialect_of(tokenizer)
        # Tokens that are not called special are marks as well if the template writes them.
        marks = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or _is_written(token.content, self._template.source)
        }
        self._marks = _any_of(marks)
        self._mark_ids = frozenset(marks.values())
        tags = {f"</{tag}>" for tag in _CLOSING_TAG.findall(self._template.source)}
        self._tags = _any_of((tags | _TAGS_IN_WORDS) - _THINKING - marks.keys())
        self._newline = self._plain_ids("\n")
        # SentencePiece puts a space before any text; before a piece of one there must be none.
        self._adds_space = self._plain_ids("\na")[len(self._newline) :] != self._plain_ids("a")
        self._folds_system = not self._shows_system()

    def encode(self, prompt: Prompt, tools: ToolUse | None = None) -> list[int]:
        """The ids to run; PromptRefused if this model cannot take this prompt.

        A raw text is the client's from its first character to its last, marks included, as with
        every completions API; only a chat has parts that are not the client's to write.
        """
        if isinstance(prompt, str):
            self._check_length(prompt)
            ids = list(self._tokenizer(prompt)["input_ids"])
        elif messages := [part for part in prompt if isinstance(part, ChatMessage)]:
            chat, disarmed = self._chat(messages, tools)
            ids = self._tokenised(self._render(chat), disarmed)
        else:
            ids = [int(part) for part in prompt if not isinstance(part, ChatMessage)]
        if not ids:
            raise PromptRefused("The prompt is empty.")
        return ids

    def _chat(
        self, messages: Sequence[ChatMessage], use: ToolUse | None
    ) -> tuple[Conversation, _Disarmed]:
        tools = use.tools if use else ()
        in_play = tools or any(turn.role == "tool" or turn.tool_calls for turn in messages)
        disarmed = _Disarmed(self._random_word(), self._marks, self._tags if in_play else _NOTHING)
        chat = Conversation(messages, tools, dialect=self.dialect, plain=disarmed.plain)
        return chat, disarmed

    def _shows_system(self) -> bool:
        """Whether the template has a place for instructions; some drop them without a word."""
        turns: list[Turn] = [
            {"role": "system", "content": "Answer in rhymes."},
            {"role": "user", "content": "Hello"},
        ]
        try:
            return bool(self._template) and "Answer in rhymes." in self._template.render(turns)
        except TEMPLATE_FAULTS:
            return False

    def _render(self, chat: Conversation) -> str:
        turns = chat.turns()
        ways = [alternating(turns)] if self._folds_system else [turns, alternating(turns)]
        for way in ways:  # some templates insist that user and assistant alternate
            try:
                rendered = self._template.render(way, tools=chat.tools)
            except TEMPLATE_FAULTS as exc:
                fault = exc
            else:
                self._check_length(rendered)
                return rendered
        raise PromptRefused(f"The model's chat template refuses these messages: {fault}") from fault

    def _check_length(self, text: str) -> None:
        if self._max_characters is not None and len(text) > self._max_characters:
            raise PromptRefused(
                f"The prompt has {len(text)} characters: more than the context window can hold."
            )

    def _tokenised(self, rendered: str, disarmed: _Disarmed) -> list[int]:
        ids: list[int] = []
        as_text: dict[str, list[int]] = {}
        for place, piece in enumerate(disarmed.pieces(rendered)):
            if place % 2 == 1:  # a forged mark
                mark = disarmed.forged[int(piece)]
                ids += as_text.get(mark) or as_text.setdefault(mark, self._as_text(mark))
            elif piece:
                ids += self._ids(piece, first=place == 0)
        return ids

    def _ids(self, text: str, *, first: bool, split: bool = False) -> list[int]:
        before = "\n" if self._adds_space and not first else ""
        found = self._tokenizer(before + text, add_special_tokens=False, split_special_tokens=split)
        ids: list[int] = found["input_ids"]
        if before and ids[: len(self._newline)] == self._newline:
            return ids[len(self._newline) :]
        return ids if not before else self._ids(text, first=True, split=split)

    def _as_text(self, mark: str) -> list[int]:
        """The mark as the characters that it is."""
        ids = self._ids(mark, first=False, split=True)
        if self._mark_ids.isdisjoint(ids):
            return ids
        ids = [number for letter in mark for number in self._plain_ids(letter)]
        if self._mark_ids.isdisjoint(ids):
            return ids
        raise PromptRefused(f"This model cannot read {mark!r} as text.")

    def _plain_ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _is_written(token: str, template: str) -> bool:
    return bool(token.strip()) and token not in _THINKING and token in template


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """The longest of the texts; written as a tree, as some vocabularies have 6,000 marks and a
    list of these would be tried one by one at every `<` of a client's.
    """
    tree: _Tree = {}
    for text in texts:
        node = tree
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}
    return re.compile(_as_pattern(tree)) if tree else _NOTHING


def _as_pattern(tree: _Tree) -> str:
    branches = [re.escape(letter) + _as_pattern(below) for letter, below in tree.items() if letter]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if "" in tree else "")


def _with_backslash(tag: re.Match[str]) -> str:
    return tag[0].replace("/", "\\/")
