"""One request in the engine's process, seen from the daemon: what it said and nobody has read yet.

The child does not wait for readers, for one that reads slowly would stall the batch.  So what is
unread piles up here, up to a bound in bytes; who leaves more unread than that has its request
ended, and is told so.
"""

from __future__ import annotations

import math
from typing import Final

import trio

from pinaivu_node.engine.frames import Accepted, Embedded, FrameError, RefusalKind, Refused
from pinaivu_node.engine.gauge import Timing
from pinaivu_node.engine.prompt_size import count_tokens
from pinaivu_node.engine.types import (
    EmbeddingRequest,
    Embeddings,
    EngineBusy,
    EngineDead,
    EngineError,
    FinishReason,
    GenerationRequest,
    PromptRefused,
    TokenEvent,
)

MAX_UNREAD_BYTES: Final = 4 * 2**20
"""11,000 plain events, two minutes of a fast answer; or, with 20 logprobs each, 1,100."""
_EVENT_BYTES: Final = 350
_ALTERNATIVE_BYTES: Final = 160
"""What Python takes for an event of one token, and for one alternative beside it."""


class Call:
    """A generation: an async iterator of its events, which ends when all its answers have."""

    def __init__(self, request: GenerationRequest, *, timing: Timing) -> None:
        self.request_id = request.id
        self.places = request.sampling.n
        self.timing = timing
        self.prompt_tokens = count_tokens(request.prompt)
        """A guess, until the child has counted them."""
        self.accepted = False
        self.is_gauged = False
        """What is left of its prompt is in the child's gauges."""
        self.abandoned = False
        """Nobody listens any more: its reader has left, or was too slow."""
        self._open = set(range(self.places))
        """Answers that the child has not ended yet."""
        self._unfinished = self.places
        """Answers whose end has not been read."""
        self._unread_bytes = 0
        self._death: str | None = None
        # Bounded by the bytes in it, which a channel cannot count.
        self._send, self._receive = trio.open_memory_channel[Accepted | Refused | TokenEvent](
            math.inf
        )

    # -- the child's side --------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether the child has ended every answer."""
        return not self._open

    @property
    def ungauged_tokens(self) -> int:
        """Tokens of its prompt that are to be computed, and that no gauges have told of yet."""
        return 0 if self.is_gauged or self.timing.first is not None else self.prompt_tokens

    def answer(self, said: Accepted | Refused) -> None:
        """Hand on whether the child takes the prompt."""
        match said:
            case Refused():
                self._open.clear()
            case Accepted(input_tokens=input_tokens):
                self.accepted, self.prompt_tokens = True, input_tokens
        if not self.abandoned:
            self._send.send_nowait(said)

    def deliver(self, event: TokenEvent) -> None:
        """Hand on an event, unless nobody listens; if too many are unread, give the call up."""
        if event.index not in self._open:
            raise FrameError(f"answer {event.index} of {event.request_id} is not open")
        if event.finish_reason is not None:
            self._open.discard(event.index)
        if self.abandoned:
            return
        self._unread_bytes += _size(event)
        self._send.send_nowait(event)
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self._give_up(event)

    def die(self, cause: str) -> None:
        """The child is gone; what it said before is still heard."""
        self._death = cause
        self._send.close()

    def abandon(self) -> None:
        """The reader leaves; what it has not read is forgotten."""
        self.abandoned = True
        self._receive.close()

    def _give_up(self, last: TokenEvent) -> None:
        self.abandoned = True
        for index in sorted(self._open):
            self._send.send_nowait(
                TokenEvent(
                    request_id=self.request_id,
                    token_ids=(),
                    text="",
                    input_tokens=last.input_tokens,
                    cached_tokens=last.cached_tokens,
                    finish_reason=FinishReason.ERROR,
                    error=f"ended: {MAX_UNREAD_BYTES // 2**20} MB of the answer were not read",
                    index=index,
                )
            )

    # -- the reader's side -------------------------------------------------------------------------

    async def wait_accepted(self) -> None:
        """Return when the child has taken the prompt.

        Raises PromptRefused or EngineBusy if it does not take it, EngineDead if it ends first.
        """
        said = await self._next()
        if isinstance(said, Refused):
            raise refusal(said)

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._unfinished == 0:
            raise StopAsyncIteration
        event = await self._next()
        if not isinstance(event, TokenEvent):
            raise EngineDead("the engine spoke out of turn")
        self._unread_bytes -= _size(event)
        self._unfinished -= event.finish_reason is not None
        return event

    async def _next(self) -> Accepted | Refused | TokenEvent:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise EngineDead(self._death or "the engine ended") from None


class EmbeddingCall:
    """An embedding: its vectors as they come, and whoever waits for the last."""

    places: Final = 1

    def __init__(self, request: EmbeddingRequest) -> None:
        self.request_id = request.id
        self.abandoned = False
        self._wanted = len(request.inputs)
        self._vectors: list[tuple[float, ...]] = []
        self._input_tokens = 0
        self._failure: EngineError | None = None
        self._settled = trio.Event()

    # -- the child's side --------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether the child has said all it will."""
        return self._settled.is_set()

    def deliver(self, said: Embedded) -> None:
        """Take in the next vectors."""
        vectors = said.embeddings.vectors
        if len(self._vectors) + len(vectors) > self._wanted:
            raise FrameError(f"too many vectors for {self.request_id}")
        self._vectors += vectors
        self._input_tokens += said.embeddings.input_tokens
        if len(self._vectors) == self._wanted:
            self._settled.set()

    def answer(self, said: Refused) -> None:
        """The child will not do it."""
        self._fail(refusal(said))

    def die(self, cause: str) -> None:
        """The child is gone."""
        self._fail(EngineDead(cause))

    def abandon(self) -> None:
        """The reader leaves."""
        self.abandoned = True

    def _fail(self, failure: EngineError) -> None:
        self._failure = failure
        self._settled.set()

    # -- the reader's side -------------------------------------------------------------------------

    async def wait(self) -> Embeddings:
        """All vectors; PromptRefused, EngineBusy or EngineDead if they will not come."""
        await self._settled.wait()
        if self._failure is not None:
            raise self._failure
        return Embeddings(tuple(self._vectors), self._input_tokens)


def refusal(said: Refused) -> PromptRefused | EngineBusy:
    """What the child said, as an `Engine` says it."""
    match said.kind:
        case RefusalKind.REQUEST:
            return PromptRefused(said.reason)
        case RefusalKind.FULL:
            return EngineBusy(said.reason)


def _size(event: TokenEvent) -> int:
    """Roughly the memory that an event holds."""
    text = len(event.text) + sum(
        _EVENT_BYTES + len(call.arguments) + len(call.name or "") for call in event.tool_calls
    )
    alternatives = sum(1 + len(each.top) for each in event.logprobs)
    return _EVENT_BYTES + 36 * len(event.token_ids) + 4 * text + _ALTERNATIVE_BYTES * alternatives
