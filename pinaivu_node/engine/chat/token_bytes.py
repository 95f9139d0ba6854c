"""What each token is in bytes.

A token may be a part of a character, so its bytes and not its text are what can be put together.
Two families of tokenizers cover nearly every model: byte-level BPE (each byte has a printable
stand-in) and SentencePiece (text with `▁` for a space, and `<0x0A>` for a byte no other token has).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_COMPOSABLE: Final = frozenset({"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"})


def _stand_ins() -> dict[str, int]:
    """The printable characters with which byte-level BPE writes the bytes (as GPT-2 did first)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


_STAND_INS: Final = _stand_ins()


class TokenBytes:
    """The bytes of each token of one tokenizer, found when first asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._token_of: Callable[[int], str | None] = tokenizer.backend_tokenizer.id_to_token
        added = tokenizer.added_tokens_decoder
        self._special = {
            number: token.content.encode() for number, token in added.items() if token.special
        }
        self._known: dict[int, bytes] = {}
        convert = _converter(tokenizer.backend_tokenizer.decoder)
        self._convert = convert or str.encode
        self.composable: Final = convert is not None
        """Whether a text is the bytes of its tokens, one after the other.  If not, `of` is the
        token as the vocabulary writes it."""

    def of(self, token_id: int) -> bytes:
        """The bytes; of a special token its name, of an id that is no token nothing."""
        found = self._known.get(token_id)
        if found is None:
            found = self._special.get(token_id)
            if found is None:
                found = self._convert(self._token_of(token_id) or "")
            self._known[token_id] = found  # bounded by the vocabulary: the caller's ids are checked
        return found

    def is_special(self, token_id: int) -> bool:
        """Whether the reader of an answer does not see it."""
        return token_id in self._special


def _converter(decoder: Any) -> Callable[[str], bytes] | None:
    """How a token of the vocabulary becomes bytes; None if its neighbours have a say in it."""
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return _from_stand_ins
    if not kinds <= _COMPOSABLE or any("Regex" in step.get("pattern", ()) for step in steps):
        return None
    replaced = [_replacement(step) for step in steps if step["type"] in ("Metaspace", "Replace")]
    with_bytes = "ByteFallback" in kinds

    def from_pieces(token: str) -> bytes:
        if with_bytes and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode(errors="replace")

    return from_pieces


def _replacement(step: dict[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    return step["pattern"]["String"], step["content"]


def _from_stand_ins(token: str) -> bytes:
    try:
        return bytes(_STAND_INS[letter] for letter in token)
    except KeyError:  # an added token, kept as its own text
        return token.encode(errors="replace")
