"""Prompts to token ids: the model's own chat template, and no way for a user to forge its marks.

A template writes the turns of a chat as text with special tokens between them (`<|im_end|>`).  A
user who types such a mark must not end her turn and begin the system's.  So before rendering, each
mark in a message is replaced by a word nobody can guess; after rendering, the text is split at
these words, and in their places the mark is tokenised as the ordinary characters that it is.  A
prompt without forged marks is tokenised in one piece, exactly as the model's authors do it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import jinja2

from pinaivu_node.engine.types import ChatMessage, PromptRefused

_SYSTEM_ROLES = ("system", "developer")


class PromptEncoder:
    """Token ids of a prompt, for one tokenizer."""

    def __init__(self, tokenizer: Any, *, random_word: Callable[[], str]) -> None:
        """`random_word` draws letters and digits that no client can guess."""
        self._tokenizer = tokenizer
        self._random_word = random_word
        added = tokenizer.added_tokens_decoder.values()
        marks = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None

    def encode(self, prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]) -> list[int]:
        """The ids to run; PromptRefused if this model cannot take this prompt.

        A raw text is the client's from its first character to its last, marks included, as with
        every completions API; only a chat has parts that are not the client's to write.
        """
        if isinstance(prompt, str):
            ids = self._tokenizer(prompt)["input_ids"]
        elif prompt and isinstance(prompt[0], ChatMessage):
            ids = self._chat(list(prompt))
        else:
            ids = [int(part) for part in prompt if not isinstance(part, ChatMessage)]
        if not ids:
            raise PromptRefused("The prompt is empty.")
        return list(ids)

    def _chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise PromptRefused(
                "This model has no chat template; it continues text. Use /v1/completions."
            )
        word = self._random_word()
        forged: list[str] = []

        def disarm(found: re.Match[str]) -> str:
            forged.append(found.group())
            return f"{word}x{len(forged) - 1}x"

        def plain(text: str) -> str:
            return text if self._marks is None else self._marks.sub(disarm, text)

        turns = [(message.role, plain(message.content)) for message in messages]
        return self._tokenised(self._rendered(system_first(turns)), word=word, forged=forged)

    def _rendered(self, turns: list[tuple[str, str]]) -> str:
        try:
            return self._render(turns)
        except jinja2.TemplateError:
            pass
        try:  # Some templates know no system role, or insist that user and assistant alternate.
            return self._render(alternating(turns))
        except jinja2.TemplateError as exc:
            raise PromptRefused(f"The model's chat template refuses these messages: {exc}") from exc

    def _render(self, turns: list[tuple[str, str]]) -> str:
        rendered = self._tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            tokenize=False,
            add_generation_prompt=True,
        )
        return str(rendered)

    def _tokenised(self, rendered: str, *, word: str, forged: list[str]) -> list[int]:
        # re.split with a group alternates: text, number of the forged mark, text, …
        pieces = re.split(f"{word}x([0-9]+)x", rendered) if forged else [rendered]
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            is_mark = place % 2 == 1
            if piece:
                ids += self._tokenizer(
                    forged[int(piece)] if is_mark else piece,
                    add_special_tokens=False,
                    split_special_tokens=is_mark,
                )["input_ids"]
        return ids


def system_first(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns with all instructions (system, developer) merged into one turn at the start.

    Templates take one system turn and only there; some drop the others without a word.
    """
    system = [content for role, content in turns if role in _SYSTEM_ROLES]
    rest = [turn for turn in turns if turn[0] not in _SYSTEM_ROLES]
    return [("system", "\n\n".join(system)), *rest] if system else rest


def alternating(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same conversation for a strict template: instructions folded into the first user turn,
    neighbouring turns of one role joined.
    """
    as_user = [("user" if role == "system" else role, content) for role, content in turns]
    return [
        (role, "\n\n".join(content for _, content in group))
        for role, group in groupby(as_user, key=lambda turn: turn[0])
    ]
