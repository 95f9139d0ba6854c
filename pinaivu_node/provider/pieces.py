"""What an engine brought for one job, gathered and cut into deltas that a frame can hold.  Pure.

The engine is ours, so what it says is made to fit instead of being refused: bytes of a token or
arguments of a call that are longer than the wire takes are cut, once here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from pinaivu_node.engine import types
from pinaivu_node.engine.types import FinishReason, TokenEvent
from pinaivu_node.protocol.inference import (
    LEAST_LOGPROB,
    MAX_ALTERNATIVES,
    MAX_TOOLS,
    Finish,
    Likelihood,
    TokenLogprob,
    ToolCallDelta,
)

MAX_IDS: Final = 4096
MAX_TEXT_BYTES: Final = 65_536
"""What a TokenDelta takes.  Bytes, where it says characters: simpler, and shorter."""
_DELTA_BYTES: Final = 120
"""A delta's request id, its field names and the framing around them."""
_ID_BYTES: Final = 5
_LIKELIHOOD_BYTES: Final = 18
"""Beside the token's own: its id, a float of eight bytes, and the framing."""
_CALL_BYTES: Final = 48
_MAX_LOGPROBS: Final = 64
"""Tokens in one delta that have logprobs: at worst 350 kB, and 30 kB of usual ones."""
_MAX_TOKEN_BYTES: Final = 256
"""The longest token of any vocabulary known is half of it."""
_MAX_CALLS: Final = 256
"""Pieces of calls in one delta."""
_FINISH: Final = {
    FinishReason.STOP: Finish.STOP,
    FinishReason.LENGTH: Finish.LENGTH,
    FinishReason.TOOL_CALLS: Finish.TOOL_CALLS,
}
"""Of one of several answers; any other end is that of the whole job, and in its Done."""


class Piece(NamedTuple):
    """What goes into one delta; `size` is about how long it is on the wire."""

    ids: tuple[int, ...]
    text: bytes
    logprobs: tuple[TokenLogprob, ...]
    calls: tuple[ToolCallDelta, ...]
    size: int
    answer: int
    finish: Finish | None


class Pile:
    """What one job's engine brought for one answer since the last round."""

    def __init__(self, index: int = 0, *, says_finish: bool = False) -> None:
        """`says_finish`: the answer is one of several, and says itself how it ended."""
        self._index: Final = index
        self._says_finish: Final = says_finish
        self._finish: Finish | None = None
        self.size = _DELTA_BYTES
        """About how long it will be on the wire."""
        self._ids: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._calls: list[ToolCallDelta] = []

    def add(self, event: TokenEvent) -> None:
        """Put this on top."""
        self._ids += event.token_ids
        self._text.append(event.text)
        if self._says_finish and event.finish_reason is not None:
            self._finish = _FINISH.get(event.finish_reason)
        self.size += _ID_BYTES * len(event.token_ids) + len(event.text)
        if event.logprobs:
            added = [_wire_logprob(each) for each in event.logprobs]
            self._logprobs += added
            self.size += sum(map(_logprob_size, added))
        for call in event.tool_calls:
            for part in _wire_calls(call):
                self._calls.append(part)
                self.size += _call_size(part)

    def pieces(self) -> Iterator[Piece]:
        """All of it in portions that a delta takes; nearly always one."""
        # Half a surrogate pair has no UTF-8; an engine that relays another's JSON may bring one.
        text = "".join(self._text).encode(errors="replace")
        ids, logprobs, calls = tuple(self._ids), tuple(self._logprobs), tuple(self._calls)
        is_last = False
        while not is_last and (ids or text or calls or self._finish):
            most = _MAX_LOGPROBS if logprobs else MAX_IDS
            cut, last = _character_boundary(text, MAX_TEXT_BYTES), _calls_that_fit(calls)
            parts = (ids[:most], text[:cut], logprobs[:most], calls[:last])
            ids, text, logprobs, calls = ids[most:], text[cut:], logprobs[most:], calls[last:]
            is_last = not (ids or text or calls)
            yield Piece(*parts, _size(*parts), self._index, self._finish if is_last else None)


def _size(
    ids: tuple[int, ...],
    text: bytes,
    logprobs: tuple[TokenLogprob, ...],
    calls: tuple[ToolCallDelta, ...],
) -> int:
    size = _DELTA_BYTES + _ID_BYTES * len(ids) + len(text)
    return size + sum(map(_logprob_size, logprobs)) + sum(map(_call_size, calls))


def _character_boundary(text: bytes, limit: int) -> int:
    """The longest cut within `limit` that splits no character."""
    cut = min(limit, len(text))
    while cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _calls_that_fit(calls: tuple[ToolCallDelta, ...]) -> int:
    size = 0
    for count, call in enumerate(calls[:_MAX_CALLS]):
        size += _call_size(call)
        if count and size > MAX_TEXT_BYTES:
            return count
    return min(len(calls), _MAX_CALLS)


def _wire_logprob(each: types.TokenLogprob) -> TokenLogprob:
    # Built without validation, as everything on this path: the engine's own types are trusted.
    top = tuple(map(_likelihood, each.top[:MAX_ALTERNATIVES]))
    return TokenLogprob.model_construct(chosen=_likelihood(each.chosen), top=top)


def _likelihood(each: types.Alternative) -> Likelihood:
    # Rounding may leave a certain token a little above 0; NaN fails every comparison.
    logprob = max(LEAST_LOGPROB, each.logprob)
    return each.token_id, each.token[:_MAX_TOKEN_BYTES], min(0.0, logprob)


def _wire_calls(call: types.ToolCallDelta) -> Iterator[ToolCallDelta]:
    """The piece of a call in pieces that the wire takes; none of one call too many."""
    if call.index >= MAX_TOOLS:
        return
    arguments = call.arguments.encode(errors="replace")
    cut = _character_boundary(arguments, MAX_TEXT_BYTES)
    yield ToolCallDelta.model_construct(
        index=call.index,
        id=None if call.id is None else _sayable(call.id),
        name=_sayable(call.name) if call.name else None,
        arguments=arguments[:cut].decode(),
    )
    while arguments := arguments[cut:]:
        cut = _character_boundary(arguments, MAX_TEXT_BYTES)
        yield ToolCallDelta.model_construct(
            index=call.index, id=None, name=None, arguments=arguments[:cut].decode()
        )


def _sayable(name: str) -> str:
    return name[:64].encode(errors="replace").decode()


def _logprob_size(each: TokenLogprob) -> int:
    alternatives = (each.chosen, *each.top)
    return sum(_LIKELIHOOD_BYTES + len(token) for _, token, _ in alternatives)


def _call_size(call: ToolCallDelta) -> int:
    return _CALL_BYTES + len(call.arguments.encode())
