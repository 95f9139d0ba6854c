"""What was done for one job so far, and the statement about it that we sign.

Pure.  Output tokens are counted when they are handed to the gateway's stream, not when the engine
made them: what lay ready and was never sent is not sold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from pinaivu_node.engine import types
from pinaivu_node.engine.types import (
    ChatMessage,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from pinaivu_node.protocol.answer import AnswersHash
from pinaivu_node.protocol.ids import Milliseconds, PeerId, RequestId
from pinaivu_node.protocol.inference import (
    ChatTurn,
    Constraint,
    Dispatch,
    Finish,
    Prompt,
    Sampling,
    ToolCallDelta,
    ToolUse,
)
from pinaivu_node.protocol.market import DispatchToken, Proof, SegmentOutcome
from pinaivu_node.protocol.money import ZERO_USAGE, TokenUsage
from pinaivu_node.protocol.signing import Envelope
from pinaivu_node.provider.warmth import Chain


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended: what the gateway is told, and what the proof says."""

    finish: Finish
    outcome: SegmentOutcome
    explanation: str = ""
    is_void: bool = False
    """Nothing of it is to be paid, whatever was computed."""


STOPPED = Ending(Finish.STOP, SegmentOutcome.COMPLETED)
CALLED_TOOLS = Ending(Finish.TOOL_CALLS, SegmentOutcome.COMPLETED)
AT_LIMIT = Ending(Finish.LENGTH, SegmentOutcome.COMPLETED)
CANCELLED = Ending(Finish.CANCELLED, SegmentOutcome.CANCELLED)


def failed(explanation: str) -> Ending:
    """The engine did not finish the job."""
    return Ending(Finish.ERROR, SegmentOutcome.ERROR, explanation)


def stalled(explanation: str) -> Ending:
    """We gave the job up because its gateway did not do its part."""
    return Ending(Finish.ERROR, SegmentOutcome.STALLED, explanation)


def over_limits(explanation: str) -> Ending:
    """The job is not the one that was auctioned; nobody pays for finding out."""
    return Ending(Finish.ERROR, SegmentOutcome.REFUSED, explanation, is_void=True)


def ending_of(event: TokenEvent) -> Ending | None:
    """What an engine's event says about the end; None if it goes on."""
    match event.finish_reason:
        case None:
            return None
        case FinishReason.STOP:
            return STOPPED
        case FinishReason.TOOL_CALLS:
            return CALLED_TOOLS
        case FinishReason.LENGTH:
            return AT_LIMIT
        case FinishReason.CANCELLED:
            return CANCELLED
        case FinishReason.ERROR:
            return failed(event.error or "the engine failed")
        case _:
            assert_never(event.finish_reason)


class Job:
    """The account of one running job.  Times are seconds of one monotonic clock."""

    def __init__(self, dispatch: Dispatch, token: DispatchToken, *, now: float) -> None:
        self.token = token
        self.chain = Chain(token.gateway, dispatch.fingerprints)
        self.resumed_tokens = len(dispatch.resume_token_ids)
        self.output_tokens = 0
        self.position = self.resumed_tokens
        """Output tokens of the whole answer so far, another provider's included."""
        self.input_tokens = 0
        self.cached_tokens = 0
        self.started_at = now
        self._token_digest = dispatch.token.digest
        self._first_at: float | None = None
        self.answers = dispatch.sampling.n
        self._answer = AnswersHash(self.answers)
        self._unfinished = self.answers
        self._voucher: Envelope | None = None
        self._vouched = 0

    @property
    def request_id(self) -> RequestId:
        """Which request it is part of."""
        return self.token.request_id

    @property
    def unvouched(self) -> int:
        """Tokens sent that the gateway has not owned up to."""
        return self.output_tokens - self._vouched

    @property
    def is_read(self) -> bool:
        """Whether the engine has read the prompt, made a token, and said how long the prompt was.

        Some engines, behind an API of others, say that at the end only.
        """
        return self._first_at is not None and self.input_tokens > 0

    def computed(self, event: TokenEvent, *, now: float) -> None:
        """Note the prompt's exact size, and when the first token was there."""
        self.input_tokens = event.input_tokens
        self.cached_tokens = min(event.cached_tokens, event.input_tokens)
        if self._first_at is None and event.token_ids:
            self._first_at = now

    def ending_after(self, event: TokenEvent) -> Ending | None:
        """How the job ended with this event; None while one of its answers goes on.

        Of several answers that end well it is the last one's end: each says its own.
        """
        ending = ending_of(event)
        if ending is None or ending.outcome is not SegmentOutcome.COMPLETED:
            return ending
        self._unfinished -= 1
        return None if self._unfinished else ending

    def sent(
        self, tokens: int, text: bytes, calls: Iterable[ToolCallDelta] = (), *, index: int = 0
    ) -> None:
        """Count what is handed to the gateway's stream now."""
        self.output_tokens += tokens
        self.position += tokens
        answer = self._answer[index]
        answer.add_text(text)
        for call in calls:
            answer.add_call(call)

    def vouched(self, envelope: Envelope, tokens: int) -> None:
        """Keep the best voucher; its signature has been checked.

        A gateway may repeat itself or fall behind itself, and gains nothing by it.  One for more
        than we sent is kept as it is: the bill takes the smaller count anyway.
        """
        if tokens > self._vouched:
            self._voucher = envelope
            self._vouched = min(tokens, self.output_tokens)

    def speed(self, *, now: float) -> float:
        """Tokens per second since the first one."""
        if self._first_at is None or now <= self._first_at:
            return 0.0
        return self.output_tokens / (now - self._first_at)

    def proof(self, ending: Ending, *, me: PeerId, now: float) -> Proof:
        """What we did, to be signed."""
        first_at = now if self._first_at is None else self._first_at
        return Proof(
            request_id=self.request_id,
            provider=me,
            gateway=self.token.gateway,
            model_digest=self.token.model_digest,
            usage=ZERO_USAGE if ending.is_void else self._usage(),
            output_hash=self._answer.digest,
            token=self._token_digest,
            outcome=ending.outcome,
            engine_ttft_ms=_milliseconds(first_at - self.started_at),
            duration_ms=_milliseconds(now - self.started_at),
            voucher=self._voucher,
        )

    def _usage(self) -> TokenUsage:
        return TokenUsage(
            input=self.input_tokens - self.cached_tokens,
            cached_input=self.cached_tokens,
            output=self.output_tokens,
        )


def generation_of(dispatch: Dispatch, *, deadline_ms: int) -> GenerationRequest:
    """What the engine is asked to do for a dispatch that was found good."""
    return GenerationRequest(
        id=dispatch.request_id,
        prompt=_engine_prompt(dispatch.prompt),
        sampling=_engine_sampling(dispatch.sampling),
        resume_token_ids=dispatch.resume_token_ids,
        tenant=dispatch.tenant,
        deadline_ms=deadline_ms,
        constraint=_engine_constraint(dispatch.sampling.constraint),
        tools=_engine_tools(dispatch.prompt.tools),
    )


def _engine_sampling(sampling: Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        n=sampling.n,
        ignore_eos=sampling.ignore_eos,
    )


def _engine_prompt(prompt: Prompt) -> tuple[ChatMessage, ...] | str | tuple[int, ...]:
    if prompt.turns is not None:
        return tuple(map(_engine_message, prompt.turns))
    if prompt.text is not None:
        return prompt.text
    return prompt.token_ids or ()


def _engine_message(turn: ChatTurn) -> ChatMessage:
    return ChatMessage(
        role=turn.role,
        content=turn.content,
        tool_calls=tuple(
            types.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
            for call in turn.tool_calls
        ),
        tool_call_id=turn.tool_call_id,
    )


def _engine_constraint(constraint: Constraint | None) -> types.Constraint | None:
    if constraint is None:
        return None
    return types.Constraint(types.ConstraintKind(constraint.kind.value), constraint.text)


def _engine_tools(use: ToolUse | None) -> types.ToolUse | None:
    if use is None:
        return None
    return types.ToolUse(
        tools=tuple(
            types.Tool(name=tool.name, description=tool.description, parameters=tool.parameters)
            for tool in use.tools
        ),
        choice=types.ToolChoice(use.choice.value),
        named=use.named,
        parallel=use.parallel,
    )


def _milliseconds(seconds: float) -> Milliseconds:
    return Milliseconds(max(0, round(1000 * seconds)))
