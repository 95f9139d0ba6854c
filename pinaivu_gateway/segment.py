"""The account of what one provider delivered of one job, kept while it streams.

Pure.  Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from typing import Final

from pinaivu_gateway.awards import Assignment
from pinaivu_node.protocol.answer import AnswersHash
from pinaivu_node.protocol.errors import PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import Digest, Milliseconds, PeerId
from pinaivu_node.protocol.inference import Done, Finish, TokenDelta, ToolCallDelta
from pinaivu_node.protocol.market import Proof, SegmentOutcome, SegmentReport, Voucher
from pinaivu_node.protocol.money import ZERO_USAGE, TokenUsage
from pinaivu_node.protocol.signing import open_untrusted

VOUCHER_STEP: Final = 128
"""Output tokens per voucher: a signature for each costs a tenth of a millisecond, and this many
tokens is all that either side can lose.  Providers stop at four times as many."""
_LONGEST_TOKEN: Final = 1024
"""Bytes of text per token, on average over an answer: the longest of any vocabulary known."""
WELL_ENDED: Final = (Finish.STOP, Finish.LENGTH, Finish.TOOL_CALLS)


class Segment:
    """One dispatch, from the moment it was sent."""

    def __init__(
        self,
        assignment: Assignment,
        *,
        gateway: PeerId,
        input_estimate: int,
        now: float,
        position: int = 0,
        answers: int = 1,
    ) -> None:
        """`position`: output tokens that other providers delivered before."""
        self.assignment: Final = assignment
        self.output_tokens = 0
        self._gateway: Final = gateway
        self._input_estimate: Final = input_estimate
        self._start: Final = position
        self._started_at: Final = now
        self._first_at: float | None = None
        self._vouched = 0
        self._answers: Final = answers
        self._unfinished = set(range(answers)) if answers > 1 else set()
        """Of several answers, those that have not said how they ended."""
        self._answer = AnswersHash(answers)
        self._bytes = 0
        self._proven: TokenUsage | None = None

    @property
    def provider(self) -> PeerId:
        """Whose part this is."""
        return self.assignment.provider

    @property
    def output_hash(self) -> Digest:
        """Of the answer so far."""
        return self._answer.digest

    @property
    def has_begun(self) -> bool:
        """Whether there was a token."""
        return self._first_at is not None

    @property
    def is_whole(self) -> bool:
        """Whether no one of several answers is without its end."""
        return not self._unfinished

    def take_untrusted(self, delta: TokenDelta, *, now: float) -> None:
        """Count what a frame brought.  RemoteProtocolError: a gap, a repeat, or too much."""
        self._check_answer_untrusted(delta)
        expected = self._start + self.output_tokens
        if delta.position != expected:
            raise RemoteProtocolError(f"tokens at {delta.position}, not at {expected}")
        total = self.output_tokens + len(delta.token_ids)
        if self._start + total > self.assignment.token.output_limit:
            raise RemoteProtocolError("more output tokens than were auctioned")
        if delta.logprobs and len(delta.logprobs) != len(delta.token_ids):
            raise RemoteProtocolError("not one logprob for each token")
        text = delta.text.encode()
        self._bytes += len(text) + sum(map(_size_of_call, delta.tool_calls))
        if self._bytes > _LONGEST_TOKEN * max(1, total):
            raise RemoteProtocolError("more text than so few tokens can stand for")
        self.output_tokens = total
        answer = self._answer[delta.index]
        answer.add_text(text)
        for call in delta.tool_calls:
            answer.add_call(call)
        if delta.finish is not None:
            self._unfinished.discard(delta.index)
        if self._first_at is None and delta.token_ids:
            self._first_at = now

    def _check_answer_untrusted(self, delta: TokenDelta) -> None:
        if delta.index >= self._answers:
            raise RemoteProtocolError(f"answer {delta.index} of {self._answers}")
        if self._answers > 1 and delta.index not in self._unfinished:
            raise RemoteProtocolError("more of an answer that had ended")
        if delta.finish is not None and (self._answers == 1 or delta.finish not in WELL_ENDED):
            raise RemoteProtocolError(f"an answer that ends with {delta.finish.value} by itself")

    def voucher_due(self) -> Voucher | None:
        """A voucher for everything so far, if a step was passed since the last."""
        if self.output_tokens - self._vouched < VOUCHER_STEP:
            return None
        self._vouched = self.output_tokens
        return Voucher(
            request_id=self.assignment.token.request_id,
            provider=self.provider,
            output_tokens=self.output_tokens,
        )

    def finish_untrusted(self, done: Done) -> TokenUsage:
        """What was used, as proven and as we counted ourselves.

        RemoteProtocolError (a ban: it is signed) if the proof is not of what was delivered here.
        """
        token = self.assignment.token
        proof = open_untrusted(done.proof, Proof, signer=self.provider)
        fault = None
        if (proof.request_id, proof.provider) != (token.request_id, self.provider):
            fault = "another job"
        elif proof.gateway != self._gateway or proof.token != self.assignment.envelope.digest:
            fault = "another dispatch"
        elif proof.model_digest != token.model_digest:
            fault = "another model"
        elif proof.usage.prompt > token.input_limit + self._start:
            fault = "a longer prompt than was auctioned"
        elif proof.usage.output != self.output_tokens:
            fault = f"{proof.usage.output} tokens where {self.output_tokens} came"
        elif proof.output_hash != self.output_hash:
            fault = "another text"
        if fault is not None:
            raise RemoteProtocolError(f"a proof of {fault}", action=PeerAction.BAN)
        self._proven = proof.usage
        return proof.usage

    def report(self, outcome: SegmentOutcome, *, now: float) -> SegmentReport:
        """What we sign about it.

        Without a proof nobody has told us the prompt's size, and our own estimate stands.
        """
        usage = self._proven
        if usage is None:
            usage = TokenUsage(
                input=self._input_estimate, cached_input=0, output=self.output_tokens
            )
        return SegmentReport(
            provider=self.provider,
            usage=usage if self.output_tokens else ZERO_USAGE,
            output_hash=self.output_hash,
            outcome=outcome,
            ttft_ms=None if self._first_at is None else _ms(self._first_at - self._started_at),
            duration_ms=_ms(now - self._started_at),
        )


def _size_of_call(call: ToolCallDelta) -> int:
    # An empty piece counts too, or there could be any number of them.
    return 1 + len((call.id or "") + (call.name or "") + call.arguments)


def _ms(seconds: float) -> Milliseconds:
    return Milliseconds(max(0, round(1000 * seconds)))
