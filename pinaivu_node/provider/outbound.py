"""What is to go out to one gateway: as few frames as the stream allows, and no delay for it.

Pure.  Jobs put in what their engines bring, whenever they bring it; one writer takes out all that
is there each time its last frame has left.  While the stream is quick that is one frame per engine
step, and while it is slow the frames grow instead of their number.

Within one round Accepts and Refuses leave first, then tokens, then Dones.  That keeps each
request's own order, which is the only one promised: nothing of a request is put in after its Done,
and nothing before its Accept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from pinaivu_node.protocol.ids import RequestId
from pinaivu_node.protocol.inference import Accept, Done, Refuse, TokenDelta, Tokens
from pinaivu_node.protocol.wire import encode
from pinaivu_node.provider.jobs import Ending, Job

_MAX_IDS: Final = 4096
_MAX_TEXT_BYTES: Final = 65_536
"""What a TokenDelta takes.  Bytes, where it says characters: simpler, and shorter."""
_FRAME_BYTES: Final = 512 * 1024
"""Half the longest frame, so that an estimate of the encoded size is good enough."""
_DELTA_BYTES: Final = 120
"""A delta's request id, its field names and the framing around them."""
_ID_BYTES: Final = 5


@dataclass(slots=True)
class _Waiting:
    """What one job's engine brought since the last round."""

    job: Job
    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


class Outbound:
    """Everything that waits for one gateway's stream; owned by that stream's server."""

    def __init__(self, seal: Callable[[Job, Ending], Done]) -> None:
        """`seal` makes the last word on a job; it is called when all its tokens have left."""
        self._seal = seal
        self._openers: list[Accept | Refuse] = []
        self._tokens: dict[RequestId, _Waiting] = {}
        self._endings: deque[tuple[Job, Ending]] = deque()
        self.waiting_bytes = 0
        """About how long the tokens that wait will be on the wire."""

    def __len__(self) -> int:
        return len(self._openers) + len(self._tokens) + len(self._endings)

    @property
    def waiting_answers(self) -> int:
        """How many Accepts and Refuses wait: a gateway that asks on without reading fills this."""
        return len(self._openers)

    def answer(self, message: Accept | Refuse) -> None:
        """Answer a dispatch."""
        self._openers.append(message)

    def add(self, job: Job, ids: tuple[int, ...], text: str) -> None:
        """Send these tokens of an accepted job."""
        waiting = self._tokens.get(job.request_id)
        if waiting is None:
            self._tokens[job.request_id] = waiting = _Waiting(job)
            self.waiting_bytes += _DELTA_BYTES
        waiting.ids += ids
        waiting.text.append(text)
        self.waiting_bytes += _ID_BYTES * len(ids) + len(text)

    def end(self, job: Job, ending: Ending) -> None:
        """Say Done after everything that was added."""
        self._endings.append((job, ending))

    def drop_tokens(self, job: Job) -> None:
        """Forget what was added for this job and has not left: nobody wants it any more."""
        waiting = self._tokens.pop(job.request_id, None)
        if waiting is not None:
            size = _DELTA_BYTES + _ID_BYTES * len(waiting.ids) + sum(map(len, waiting.text))
            self.waiting_bytes -= size

    def take_unfinished(self) -> list[tuple[Job, Ending]]:
        """The endings that were never said, for a stream that is lost."""
        endings, self._endings = self._endings, deque()
        return list(endings)

    def frames(self) -> Iterator[bytes]:
        """One round: the frames for all that waits now, made as they are taken.

        A job's tokens are counted as sent when their frame is taken, so that its proof, made after
        them, says exactly what was handed to the stream.
        """
        openers, self._openers = self._openers, []
        tokens, self._tokens = self._tokens, {}
        self.waiting_bytes = 0
        # What is ended while this round is being sent may have tokens in the next one.
        endings = len(self._endings)
        for message in openers:
            yield encode(message)
        yield from _token_frames(tokens.values())
        for _ in range(endings):
            yield encode(self._seal(*self._endings.popleft()))


def _token_frames(tokens: Iterable[_Waiting]) -> Iterator[bytes]:
    deltas: list[TokenDelta] = []
    size = 0
    for waiting in tokens:
        for ids, text in _pieces(waiting):
            length = _DELTA_BYTES + _ID_BYTES * len(ids) + len(text)
            if deltas and size + length > _FRAME_BYTES:
                yield _tokens_frame(deltas)
                deltas, size = [], 0
            deltas.append(_sent_delta(waiting.job, ids, text))
            size += length
    if deltas:
        yield _tokens_frame(deltas)


def _pieces(waiting: _Waiting) -> Iterator[tuple[list[int], bytes]]:
    """The tokens in portions that a delta takes; nearly always one."""
    # Half a surrogate pair has no UTF-8; an engine that relays another's JSON can let one through.
    text = "".join(waiting.text).encode(errors="replace")
    ids = waiting.ids
    if len(ids) <= _MAX_IDS and len(text) <= _MAX_TEXT_BYTES:
        yield ids, text
        return
    while ids or text:
        cut = _character_boundary(text, _MAX_TEXT_BYTES)
        yield ids[:_MAX_IDS], text[:cut]
        ids, text = ids[_MAX_IDS:], text[cut:]


def _character_boundary(text: bytes, limit: int) -> int:
    """The longest cut within `limit` that splits no character."""
    cut = min(limit, len(text))
    while cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _sent_delta(job: Job, ids: list[int], text: bytes) -> TokenDelta:
    # Built without validation: this is the hot path, and the engine's own types are trusted.
    delta = TokenDelta.model_construct(
        request_id=job.request_id, position=job.position, token_ids=tuple(ids), text=text.decode()
    )
    job.sent(len(ids), text)
    return delta


def _tokens_frame(deltas: list[TokenDelta]) -> bytes:
    return encode(Tokens.model_construct(deltas=tuple(deltas)))
