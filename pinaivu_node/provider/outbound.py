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
from typing import Final

from pinaivu_node.engine.types import TokenEvent
from pinaivu_node.protocol.ids import RequestId
from pinaivu_node.protocol.inference import Accept, Done, Refuse, TokenDelta, Tokens
from pinaivu_node.protocol.wire import encode
from pinaivu_node.provider.jobs import Ending, Job
from pinaivu_node.provider.pieces import Piece, Pile

_FRAME_BYTES: Final = 512 * 1024
"""Half the longest frame, so that an estimate of the encoded size is good enough."""


class Outbound:
    """Everything that waits for one gateway's stream; owned by that stream's server."""

    def __init__(self, seal: Callable[[Job, Ending], Done]) -> None:
        """`seal` makes the last word on a job; it is called when all its tokens have left."""
        self._seal = seal
        self._openers: list[Accept | Refuse] = []
        self._tokens: dict[tuple[RequestId, int], tuple[Job, Pile]] = {}
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

    def add(self, job: Job, event: TokenEvent) -> None:
        """Send what this event brought an accepted job."""
        waiting = self._tokens.get((job.request_id, event.index))
        if waiting is None:
            pile = Pile(event.index, says_finish=job.answers > 1)
            self._tokens[job.request_id, event.index] = waiting = (job, pile)
            self.waiting_bytes += waiting[1].size
        pile = waiting[1]
        self.waiting_bytes -= pile.size
        pile.add(event)
        self.waiting_bytes += pile.size

    def end(self, job: Job, ending: Ending) -> None:
        """Say Done after everything that was added."""
        self._endings.append((job, ending))

    def drop_tokens(self, job: Job) -> None:
        """Forget what was added for this job and has not left: nobody wants it any more."""
        for index in range(job.answers):
            waiting = self._tokens.pop((job.request_id, index), None)
            if waiting is not None:
                self.waiting_bytes -= waiting[1].size

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


def _token_frames(tokens: Iterable[tuple[Job, Pile]]) -> Iterator[bytes]:
    deltas: list[TokenDelta] = []
    size = 0
    for job, pile in tokens:
        for piece in pile.pieces():
            if deltas and size + piece.size > _FRAME_BYTES:
                yield _tokens_frame(deltas)
                deltas, size = [], 0
            deltas.append(_sent_delta(job, piece))
            size += piece.size
    if deltas:
        yield _tokens_frame(deltas)


def _sent_delta(job: Job, piece: Piece) -> TokenDelta:
    # Built without validation: this is the hot path, and the engine's own types are trusted.
    delta = TokenDelta.model_construct(
        request_id=job.request_id,
        position=job.position,
        token_ids=piece.ids,
        text=piece.text.decode(),
        logprobs=piece.logprobs,
        tool_calls=piece.calls,
        index=piece.answer,
        finish=piece.finish,
    )
    job.sent(len(piece.ids), piece.text, piece.calls, index=piece.answer)
    return delta


def _tokens_frame(deltas: list[TokenDelta]) -> bytes:
    return encode(Tokens.model_construct(deltas=tuple(deltas)))
