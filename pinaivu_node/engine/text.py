"""From token ids to the text a reader sees, as it grows: pure, so that a resumed answer goes on at
exactly the character where the interrupted one stopped.

Two things are held back: bytes that are not yet a whole UTF-8 character, and text that may turn out
to be the start of a stop string.  What is held back depends only on the ids and the stop strings,
so an engine that replays the ids of an interrupted answer holds back the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out; bytes that are no UTF-8 become U+FFFD."""

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_MAX_HELD_TOKENS: Final = 8
"""A UTF-8 character has at most four bytes, so at most four byte tokens: after eight, the bytes are
no character at all and are shown as the decoder shows them."""


class Detokenizer:
    """Text of one growing sequence.

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


class StopStrings:
    """Cuts a growing text before the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string ended it."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back as a possible start of a stop string that never came."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


@dataclass(frozen=True, slots=True)
class Shown:
    """What one token brought the reader."""

    text: str
    stopped: bool


class AnswerText:
    """The text of one answer: detokenised, cut at stop strings."""

    def __init__(
        self, decode: Decode, *, stops: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._detokenizer = Detokenizer(decode, before=before)
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
