"""One dispatch in flight: filled by the provider's stream, emptied by the client's response.

The two never wait for each other.  The stream's reader puts in what comes and goes on; whoever
writes to the client takes out all that lies there.  A client that does not read while a whole
answer piles up is cut off.
"""

from __future__ import annotations

from typing import Final

import trio

from pinaivu_gateway.failover import Failure
from pinaivu_gateway.jobs import JobEvent, JobFinished, TextDelta
from pinaivu_gateway.segment import WELL_ENDED, Segment
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import RequestId
from pinaivu_node.protocol.inference import (
    Accept,
    Done,
    Finish,
    Refuse,
    RefuseReason,
    TokenDelta,
    TokenLogprob,
    ToolCallDelta,
)
from pinaivu_node.protocol.market import SegmentOutcome, Voucher
from pinaivu_node.protocol.money import cost

MAX_UNREAD_CHARACTERS: Final = 1 << 20
"""Text that waits for one client: about a quarter of a million tokens, longer than most answers."""
_ALTERNATIVE: Final = 32
"""Characters that an alternative or a piece of a call weighs beside its own."""


class _Unread:
    """What came of one answer and was not taken yet."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.calls: list[ToolCallDelta] = []
        self.finish: Finish | None = None

    def add(self, delta: TokenDelta) -> None:
        self.ids.extend(delta.token_ids)
        if delta.text:
            self.texts.append(delta.text)
        if delta.logprobs:
            self.logprobs.extend(delta.logprobs)
        if delta.tool_calls:
            self.calls.extend(delta.tool_calls)
        self.finish = delta.finish

    def event(self, index: int) -> TextDelta:
        return TextDelta(
            "".join(self.texts),
            tuple(self.ids),
            tuple(self.logprobs),
            tuple(self.calls),
            index,
            self.finish,
        )


class Attempt:
    """The state of one dispatch; over when it has a `failure` or was `finished`."""

    def __init__(self, segment: Segment) -> None:
        self.segment: Final = segment
        self.failure: Failure | None = None
        self.finished: JobFinished | None = None
        self.is_accepted = False
        self._unread: dict[int, _Unread] = {}
        self._unread_size = 0
        self._changed = trio.Event()

    @property
    def request_id(self) -> RequestId:
        """Which request it serves."""
        return self.segment.assignment.token.request_id

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.failure is not None or self.finished is not None

    @property
    def outcome(self) -> SegmentOutcome:
        """How the provider's part ended; cancelled if it has not."""
        if self.finished is not None:
            return SegmentOutcome.COMPLETED
        return self.failure.outcome if self.failure else SegmentOutcome.CANCELLED

    # --- the provider's side: nothing here waits --------------------------------------------------

    def take_untrusted(
        self, message: Accept | Refuse | TokenDelta | Done, *, now: float
    ) -> Voucher | None:
        """Take in what the provider says; the voucher to send it, if one is due.

        Raises RemoteProtocolError: the attempt has failed then, and the provider is to be dropped.
        """
        if self.is_over:
            return None
        try:
            return self._take_untrusted(message, now=now)
        except RemoteProtocolError as exc:
            self.fail(SegmentOutcome.ERROR, f"it broke the protocol: {exc}")
            raise

    def fail(
        self,
        outcome: SegmentOutcome,
        explanation: str,
        *,
        refusal: RefuseReason | None = None,
    ) -> None:
        """End without success; the first end counts."""
        if not self.is_over:
            self.failure = Failure(outcome, explanation[:300], refusal)
            self._changed.set()

    def _take_untrusted(
        self, message: Accept | Refuse | TokenDelta | Done, *, now: float
    ) -> Voucher | None:
        match message:
            case TokenDelta():
                return self._take_tokens_untrusted(message, now=now)
            case Accept():
                self.is_accepted = True
                self._changed.set()
            case Refuse(reason=reason, explanation=explanation):
                if self.is_accepted:
                    raise RemoteProtocolError("a Refuse after the Accept")
                said = f"{reason.value}: {explanation}"
                if reason is RefuseReason.PROMPT_REFUSED:
                    said = explanation
                self.fail(SegmentOutcome.REFUSED, said, refusal=reason)
            case Done():
                self._finish_untrusted(message)
        return None

    def _take_tokens_untrusted(self, delta: TokenDelta, *, now: float) -> Voucher | None:
        if not self.is_accepted:
            raise RemoteProtocolError("tokens before the Accept")
        self.segment.take_untrusted(delta, now=now)
        if delta.token_ids or delta.text or delta.tool_calls or delta.finish:
            self._unread.setdefault(delta.index, _Unread()).add(delta)
        self._unread_size += _weight_of(delta)
        if self._unread_size > MAX_UNREAD_CHARACTERS:
            self.fail(SegmentOutcome.CANCELLED, "the client does not read its answer")
        self._changed.set()
        return self.segment.voucher_due()

    def _finish_untrusted(self, done: Done) -> None:
        if not self.is_accepted:
            raise RemoteProtocolError("a Done before the Accept")
        usage = self.segment.finish_untrusted(done)
        if done.finish in WELL_ENDED:
            if not self.segment.is_whole:
                raise RemoteProtocolError("a Done before all answers have ended")
            token = self.segment.assignment.token
            amount = cost(usage, token.prices, uplift_ppm=token.uplift_ppm)
            self.finished = JobFinished(done.finish, usage, amount)
            self._changed.set()
            return
        outcome = SegmentOutcome.ERROR
        if done.finish is Finish.CANCELLED:
            outcome = SegmentOutcome.CANCELLED
        self.fail(outcome, done.explanation or f"it ended with {done.finish.value}")

    # --- the client's side ------------------------------------------------------------------------

    async def wait_accepted(self) -> None:
        """Return when it was accepted or is over."""
        while not (self.is_accepted or self.is_over):
            await self._wait()

    async def wait_begun(self) -> None:
        """Return when there is a token, or when it is over."""
        while not (self.segment.has_begun or self.is_over):
            await self._wait()

    async def wait_over(self) -> None:
        """Return when nothing more will come."""
        while not self.is_over:
            await self._wait()

    def take(self) -> JobEvent | None:
        """All that lies here of one answer, as one event; None if there is nothing (more)."""
        if not self._unread:
            return self.finished
        index = next(iter(self._unread))
        event = self._unread.pop(index).event(index)
        if not self._unread:
            self._unread_size = 0
        return event

    async def wait_changed(self) -> None:
        """Return when `take` or `is_over` may say something new; at once if there is something."""
        if self._unread or self.is_over:
            await trio.lowlevel.checkpoint()
            return
        await self._wait()

    async def _wait(self) -> None:
        # Whoever waits has just looked at the state, and nothing runs between the two.
        self._changed = trio.Event()
        await self._changed.wait()


def _weight_of(delta: TokenDelta) -> int:
    """Characters of what is kept of it until the client reads; a token id counts for none."""
    calls = sum(_ALTERNATIVE + len(call.arguments) for call in delta.tool_calls)
    alternatives = sum(
        _ALTERNATIVE + len(token)
        for each in delta.logprobs
        for _, token, _ in (each.chosen, *each.top)
    )
    return len(delta.text) + calls + alternatives
