"""From token ids to the text a reader sees, as it grows: pure, so that a resumed answer goes on at
exactly the character where the interrupted one stopped.

Two things are held back: bytes that are not yet a whole UTF-8 character, and text that may turn out
to be the start of a stop string.  What is held back depends only on the ids and the stop strings,
so an engine that replays the ids of an interrupted answer holds back the same.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out; bytes that are no UTF-8 become U+FFFD."""

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_MAX_HELD_TOKENS: Final = 8
"""A UTF-8 character has at most four bytes, so at most four byte tokens: after eight, the bytes are
no character at all and are shown as the decoder shows them."""


class Detokenizer(Protocol):
    """Text of one growing sequence."""

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        ...

    def flush(self) -> str:
        """What was held back, broken bytes as U+FFFD."""
        ...


class Vocabulary(Protocol):
    """Tokens whose bytes, one after the other, are the text."""

    def of(self, token_id: int) -> bytes:
        """The token's bytes."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether the reader does not see it."""
        ...


class ByteDetokenizer:
    """For tokenizers whose tokens are bytes: about a microsecond per token, and exact."""

    def __init__(self, vocabulary: Vocabulary, *, visible: Collection[int] = ()) -> None:
        """`visible` are special tokens that are shown nevertheless, by their names."""
        self._vocabulary = vocabulary
        self._visible = frozenset(visible)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if self._vocabulary.is_special(token_id) and token_id not in self._visible:
            return ""
        return self._decoder.decode(self._vocabulary.of(token_id))

    def flush(self) -> str:
        """What was held back, broken bytes as U+FFFD."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class WindowDetokenizer:
    """For every other tokenizer.

    Decodes a short window instead of everything: a token's text can depend on the token before
    it (a space that some tokenizers drop at the start), never on much more.
    """

    def __init__(self, decode: Decode, *, before: Sequence[int] = ()) -> None:
        """`before` is the end of the prompt: context for the first token, never shown itself."""
        self._decode = decode
        self._window = list(before)
        self._shown = len(self._window)
        """Tokens of the window whose text was given out."""

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        self._window.append(token_id)
        text = self._pending()
        held = len(self._window) - self._shown
        if (not text or text.endswith(_REPLACEMENT)) and held < _MAX_HELD_TOKENS:
            return ""
        del self._window[: self._shown]
        self._shown = len(self._window)
        return text

    def flush(self) -> str:
        """What was held back, broken bytes as U+FFFD."""
        text = self._pending()
        self._shown = len(self._window)
        return text

    def _pending(self) -> str:
        known = self._decode(self._window[: self._shown])
        return self._decode(self._window)[len(known) :]


class _Stop:
    """How much of one stop string the end of a growing text is (Knuth, Morris and Pratt).

    The table of fallbacks grows with what is matched: a long stop string that never comes near
    costs nothing, neither at the start nor per token.
    """

    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        """Characters of the stop string at the end of what was pushed."""
        self._fallback = [0]
        """For each matched part: the length of the longest part that it also ends with."""

    def push(self, text: str) -> int | None:
        """Where in `text` the stop string is complete; None if it is not."""
        stop = self.text
        if self.matched == 0 and stop[0] not in text:
            return None
        for at, letter in enumerate(text):
            while self.matched and stop[self.matched] != letter:
                self.matched = self._fallback_of(self.matched)
            if stop[self.matched] == letter:
                self.matched += 1
                if self.matched == len(stop):
                    return at + 1
        return None

    def _fallback_of(self, matched: int) -> int:
        while len(self._fallback) < matched:
            letter = self.text[len(self._fallback)]
            length = self._fallback[-1]
            while length and self.text[length] != letter:
                length = self._fallback[length - 1]
            self._fallback.append(length + (self.text[length] == letter))
        return self._fallback[matched - 1]


class StopStrings:
    """Cuts a growing text before the stop string that is complete first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [_Stop(stop) for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string ended it.

        Nothing may be pushed once it did.  Of two that are complete at the same character the
        longer one cuts.
        """
        if not self._stops:
            return text, False
        ends = [(end, -len(stop.text)) for stop in self._stops if (end := stop.push(text))]
        held = len(self._held)
        self._held += text
        if ends:
            end, minus_length = min(ends)
            shown, self._held = self._held[: held + end + minus_length], ""
            return shown, True
        cut = len(self._held) - max(stop.matched for stop in self._stops)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back as a possible start of a stop string that never came."""
        shown, self._held = self._held, ""
        return shown


@dataclass(frozen=True, slots=True)
class Shown:
    """What one token brought the reader."""

    text: str
    stopped: bool


class AnswerText:
    """The text of one answer: detokenised, cut at stop strings."""

    def __init__(self, detokenizer: Detokenizer, *, stops: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)

    def push(self, token_id: int) -> Shown:
        """What this token shows; nothing may be pushed once it stopped."""
        return Shown(*self._stops.push(self._detokenizer.push(token_id)))

    def finish(self) -> Shown:
        """Everything held back, when the answer ends by a token or a limit.

        Bytes that become visible only now may still complete a stop string.
        """
        text, stopped = self._stops.push(self._detokenizer.flush())
        return Shown(text if stopped else text + self._stops.flush(), stopped)
