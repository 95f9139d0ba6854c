"""Server-sent events, byte for byte as OpenAI's clients want them.

One `data:` line of compact JSON per event and never `id:`, `event:` or `retry:`, of which some
clients die.  Everything that is the same in all chunks of a stream is encoded once: a chunk costs
one `json.dumps` of its text.
"""

from __future__ import annotations

import json
from typing import Any, Final

DONE: Final = b"data: [DONE]\n\n"
PING: Final = b": ping\n\n"
"""A comment; an empty `data:` line or an `event: ping` would break the loops of most clients."""
HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(value: object) -> bytes:
    """One event."""
    return b"data: " + _encode(value).encode("utf-8", "replace") + b"\n\n"


class ChunkTemplate:
    """The chunks of one choice of a stream.

    `head` holds the fields before `choices` (id, object, created, model, …).
    """

    def __init__(
        self, head: dict[str, Any], *, chat: bool, include_usage: bool, index: int = 0
    ) -> None:
        self._index: Final = index
        self._head: Final = _encode(head)[:-1]
        self._is_chat: Final = chat
        # Asked for usage, a client gets the key in every chunk; not asked, it never sees it, nor
        # a chunk without choices, which many index blindly.
        self._usage: Final = ',"usage":null' if include_usage else ""
        opening = '"delta":{"content":' if chat else '"text":'
        closing = "}" if chat else ""
        self._before: Final = f'data: {self._head},"choices":[{{"index":{index},{opening}'.encode(
            "utf-8", "replace"
        )
        self._closing: Final = f'{closing},"logprobs":'.encode()
        self._rest: Final = f',"finish_reason":null}}]{self._usage}}}\n\n'.encode()
        self._after: Final = self._closing + b"null" + self._rest

    def opening(self) -> bytes:
        """The first chunk of a chat says who speaks; a completion has none."""
        if not self._is_chat:
            return b""
        return self._chunk('"delta":{"role":"assistant","content":""}', "null")

    def text(self, text: str, logprobs: dict[str, Any] | None = None) -> bytes:
        """A chunk with more of the answer."""
        chunk = self._before + _encode(text).encode("utf-8", "replace")
        if logprobs is None:
            return chunk + self._after
        return chunk + self._closing + _encode(logprobs).encode("utf-8", "replace") + self._rest

    def calls(self, deltas: list[dict[str, Any]]) -> bytes:
        """A chunk with more of a chat's tool calls."""
        return self._chunk(f'"delta":{{"tool_calls":{_encode(deltas)}}}', "null")

    def finish(self, reason: str) -> bytes:
        """The end of the choice, and why."""
        return self._chunk('"delta":{}' if self._is_chat else '"text":""', _encode(reason))

    def end(self, usage: dict[str, Any]) -> bytes:
        """The end of the stream: how much, if that was asked for, and [DONE]."""
        if not self._usage:
            return DONE
        counted = f'data: {self._head},"choices":[],"usage":{_encode(usage)}}}\n\n'
        return counted.encode("utf-8", "replace") + DONE

    def _chunk(self, content: str, reason: str) -> bytes:
        choice = f'{{"index":{self._index},{content},"logprobs":null,"finish_reason":{reason}}}'
        chunk = f'data: {self._head},"choices":[{choice}]{self._usage}}}\n\n'
        return chunk.encode("utf-8", "replace")
