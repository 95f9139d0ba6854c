"""Gateway ↔ provider: prompts one way, tokens the other.

One stream per pair carries many requests.  For each: Dispatch, then Refuse, or Accept, any number
of Tokens, and Done with the signed Proof.  The gateway may say Cancel at any time; Done follows.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field

from pinaivu_node.protocol.ids import Digest, RequestIdField, TokenCount, TokenId, digest_of
from pinaivu_node.protocol.market import MAX_FINGERPRINTS, Explanation, Fingerprint
from pinaivu_node.protocol.signing import Envelope
from pinaivu_node.protocol.wire import Message, Record, Word, encode_body

MAX_PROMPT_CHARACTERS: Final = 900_000
"""What fits one frame; about 200k tokens, beyond the context of the models served."""
MAX_CONSTRAINT_CHARACTERS: Final = 131_072
"""The longest schemas that OpenAI takes have about as many."""
MAX_TOOLS: Final = 128
"""Tools of a request, and calls of a turn; as many as OpenAI takes."""
MAX_ALTERNATIVES: Final = 20
"""Beside each token; as many as OpenAI gives."""
MAX_ANSWERS: Final = 128
"""To one prompt; as many as OpenAI gives."""
LEAST_LOGPROB: Final = -9999.0
"""What stands for the logarithm of nothing, as in OpenAI's answers."""


class RefuseReason(StrEnum):
    """Why a provider does not run what was dispatched to it."""

    MALFORMED_TOKEN = "malformed_token"  # noqa: S105 - a reason, not a secret
    WRONG_SIGNER = "wrong_signer"
    OTHER_PROVIDER = "other_provider"
    OTHER_GATEWAY = "other_gateway"
    EXPIRED = "expired"
    REPLAYED = "replayed"
    WRONG_MODEL = "wrong_model"
    WRONG_INPUT = "wrong_input"
    WRONG_SAMPLING = "wrong_sampling"
    OVER_LIMITS = "over_limits"
    FULL = "full"
    DRAINING = "draining"
    PROMPT_REFUSED = "prompt_refused"
    ENGINE_UNAVAILABLE = "engine_unavailable"


class Finish(StrEnum):
    """Why a stream of tokens is over."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    """As STOP, and the answer holds a whole tool call."""
    CANCELLED = "cancelled"
    ERROR = "error"


class ConstraintKind(StrEnum):
    """What the answer must match; the text of the constraint is read accordingly."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"


class ToolChoice(StrEnum):
    """What the model is to do about its tools."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


def _is_unset(value: object) -> bool:
    """Whether an option has its default, which is not sent: most requests have none of them."""
    return not value and value != 0


def _is_one(value: object) -> bool:
    return value == 1


def _is_zero(value: object) -> bool:
    return value == 0


ToolName = Annotated[str, Field(min_length=1, max_length=64)]
"""As long as OpenAI's."""
CallId = Annotated[str, Field(max_length=256)]
Arguments = Annotated[str, Field(max_length=65536)]


class Constraint(Record):
    """A language that the answer must be a sentence of."""

    kind: Word[ConstraintKind]
    text: Annotated[str, Field(max_length=MAX_CONSTRAINT_CHARACTERS)] = ""


class ToolCall(Record):
    """A call that the model asked for in an earlier turn."""

    id: CallId
    name: ToolName
    arguments: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]


class Tool(Record):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: ToolName
    description: Annotated[str, Field(max_length=16384)] = ""
    parameters: Annotated[str, Field(max_length=MAX_CONSTRAINT_CHARACTERS)] = "{}"


class ToolUse(Record):
    """The tools of one request."""

    tools: Annotated[tuple[Tool, ...], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]
    choice: Word[ToolChoice] = ToolChoice.AUTO
    named: ToolName | None = None
    """With REQUIRED: this tool and no other."""
    parallel: bool = True


class ChatTurn(Record):
    """One message of a chat, its parts already joined."""

    role: Annotated[str, Field(max_length=32)]
    content: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
    tool_calls: Annotated[
        tuple[ToolCall, ...],
        Field(fail_fast=True, max_length=MAX_TOOLS, exclude_if=_is_unset),
    ] = ()
    """Of an assistant's turn."""
    tool_call_id: Annotated[CallId, Field(exclude_if=_is_unset)] = ""
    """Of a tool's turn: which call this answers."""


class Prompt(Record):
    """What the model is given: turns, or text, or token ids; exactly one of them."""

    nonce: Annotated[bytes, Field(min_length=16, max_length=16)]
    """Random, so that the commitment to a short prompt cannot be guessed."""
    turns: Annotated[tuple[ChatTurn, ...], Field(fail_fast=True, max_length=4096)] | None = None
    text: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)] | None = None
    token_ids: Annotated[tuple[TokenId, ...], Field(fail_fast=True, max_length=1 << 17)] | None = (
        None
    )
    tools: Annotated[ToolUse | None, Field(exclude_if=_is_unset)] = None
    """Part of the prompt, since the model's template renders them into it; with turns only."""

    @property
    def commitment(self) -> Digest:
        """What binds token, proof and receipt to this very prompt."""
        return digest_of(b"pinaivu/input/1\0" + encode_body(self))


class Sampling(Record):
    """How tokens are chosen; ranges as in the OpenAI API."""

    max_tokens: TokenCount
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: Annotated[
        tuple[tuple[TokenId, Annotated[float, Field(ge=-100, le=100)]], ...],
        Field(fail_fast=True, max_length=1024),
    ] = ()
    stop: Annotated[
        tuple[Annotated[str, Field(max_length=1024)], ...], Field(fail_fast=True, max_length=16)
    ] = ()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[
        tuple[TokenId, ...], Field(fail_fast=True, max_length=64, exclude_if=_is_unset)
    ] = ()
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None, Field(exclude_if=_is_unset)
    ] = None
    """Alternatives to report beside each chosen token; None reports no logprobs."""
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS, exclude_if=_is_one)] = 1
    """Answers to the one prompt, each of up to `max_tokens`."""
    constraint: Annotated[Constraint | None, Field(exclude_if=_is_unset)] = None
    """Here because it decides which tokens may be chosen, so that the digest covers it."""

    @property
    def digest(self) -> Digest:
        """What token and receipt name."""
        return digest_of(b"pinaivu/sampling/1\0" + encode_body(self))


class Dispatch(Message, kind="dispatch/1"):
    """Run this."""

    request_id: RequestIdField
    token: Envelope
    prompt: Prompt
    sampling: Sampling
    resume_token_ids: Annotated[tuple[TokenId, ...], Field(fail_fast=True, max_length=1 << 17)] = ()
    """Already delivered by another provider; go on after them."""
    tenant: Annotated[bytes, Field(max_length=32)] = b""
    """Salts the prefix cache: one customer cannot time another's prompts."""
    fingerprints: Annotated[
        tuple[Fingerprint, ...], Field(fail_fast=True, max_length=MAX_FINGERPRINTS)
    ] = ()


class Accept(Message, kind="accept/1"):
    """The token is good and the job is queued or running."""

    request_id: RequestIdField


class Refuse(Message, kind="refuse/1"):
    """It will not be run."""

    request_id: RequestIdField
    reason: Word[RefuseReason]
    explanation: Explanation


Likelihood = tuple[
    TokenId,
    Annotated[bytes, Field(max_length=1024)],
    Annotated[float, Field(ge=LEAST_LOGPROB, le=0)],
]
"""A token, its bytes, which may be a part of a character, and its natural log-probability by the
model's own distribution: before temperature and penalties."""


class TokenLogprob(Record):
    """How likely the chosen token was, and the likeliest in its place, most likely first."""

    chosen: Likelihood
    top: Annotated[tuple[Likelihood, ...], Field(fail_fast=True, max_length=MAX_ALTERNATIVES)] = ()


class ToolCallDelta(Record):
    """A piece of a tool call; the first of a call has its id and name."""

    index: Annotated[int, Field(ge=0, lt=MAX_TOOLS)]
    id: CallId | None = None
    name: ToolName | None = None
    arguments: Arguments = ""


class TokenDelta(Record):
    """What one step brought one request; `text` may lag behind the ids."""

    request_id: RequestIdField
    position: TokenCount
    """Output tokens before these, of all answers."""
    token_ids: Annotated[tuple[TokenId, ...], Field(fail_fast=True, max_length=4096)]
    text: Annotated[str, Field(max_length=65536)]
    logprobs: Annotated[
        tuple[TokenLogprob, ...], Field(fail_fast=True, max_length=4096, exclude_if=_is_unset)
    ] = ()
    """One per token id, if they were asked for."""
    tool_calls: Annotated[
        tuple[ToolCallDelta, ...], Field(fail_fast=True, max_length=4096, exclude_if=_is_unset)
    ] = ()
    index: Annotated[int, Field(ge=0, lt=MAX_ANSWERS, exclude_if=_is_zero)] = 0
    """Which of the request's answers."""
    finish: Annotated[Word[Finish] | None, Field(exclude_if=_is_unset)] = None
    """Of one of several answers, said with the last of it; what a single answer ended with is in
    its Done."""


class Tokens(Message, kind="tokens/1"):
    """All tokens of one engine step for one gateway: frames, not bytes, are what costs."""

    deltas: Annotated[tuple[TokenDelta, ...], Field(fail_fast=True, min_length=1, max_length=4096)]


class Done(Message, kind="done/1"):
    """The last word on a request that was accepted."""

    request_id: RequestIdField
    finish: Word[Finish]
    proof: Envelope
    explanation: Explanation = ""


class Cancel(Message, kind="cancel/1"):
    """Stop at the next token; Done follows."""

    request_id: RequestIdField


# What may arrive on an inference stream, by who reads it; an Envelope to the provider is a Voucher.
TO_PROVIDER: Final = (Dispatch, Cancel, Envelope)
TO_GATEWAY: Final = (Accept, Refuse, Tokens, Done)
