"""How long a prompt is, where there is no tokenizer to ask."""

from __future__ import annotations

import math
from typing import Final

from pinaivu_node.engine.types import ChatMessage

_BYTES_PER_TOKEN: Final = 4
_MARKS_PER_TURN: Final = 4


def count_tokens(prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]) -> int:
    """About as many tokens as a tokenizer finds: one per four bytes, and four marks per turn."""
    if isinstance(prompt, str):
        return max(1, math.ceil(len(prompt.encode(errors="replace")) / _BYTES_PER_TOKEN))
    total = 0
    for part in prompt:
        if isinstance(part, ChatMessage):
            words = part.role + part.content
            size = len(words.encode(errors="replace"))
            total += _MARKS_PER_TURN + math.ceil(size / _BYTES_PER_TOKEN)
        else:
            total += 1
    return max(1, total)
