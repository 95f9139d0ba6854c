"""What is asked of an engine and what it answers: frozen records that cross a process boundary.

`Engine` is the interface that the provider holds; `client.py` implements it over a child process
that runs a model, `openai/` over any OpenAI-compatible local server, `synthetic.py` without a
model, for measuring everything else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


class FinishReason(Enum):
    """Why a generation is over."""

    STOP = "stop"
    """End-of-sequence token, a stop token, a stop string, or a constraint that is fulfilled."""
    LENGTH = "length"
    """max_tokens, or the context window is full."""
    TOOL_CALLS = "tool_calls"
    """As STOP, and the answer holds at least one whole tool call."""
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asked for in an earlier turn."""

    id: str
    name: str
    arguments: str
    """A JSON object, as text."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn, its content already plain text."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant's turn."""
    tool_call_id: str = ""
    """Of a tool's turn: which call this answers."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: str = "{}"
    """JSON schema of the arguments, as text."""


class ToolChoice(Enum):
    """What the model is to do about its tools; a call is enforced by grammar, not hoped for."""

    AUTO = "auto"
    NONE = "none"
    """The prompt shows the tools, and the answer is text."""
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request."""

    tools: tuple[Tool, ...]
    choice: ToolChoice = ToolChoice.AUTO
    named: str | None = None
    """With REQUIRED: this tool and no other."""
    parallel: bool = True
    """Whether one answer may hold several calls."""


class ConstraintKind(Enum):
    """What the answer must match; the text of the constraint is read accordingly."""

    JSON_OBJECT = "json_object"
    """Any JSON object; no text."""
    JSON_SCHEMA = "json_schema"
    """The schema, as JSON."""
    REGEX = "regex"
    """Of the whole answer; the syntax of the Rust crate `regex`, without look-around."""
    CHOICE = "choice"
    """A JSON list of strings, one of which is the answer."""
    LARK = "lark"
    """A context-free grammar in llguidance's dialect of Lark."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A language that the answer must be a sentence of."""

    kind: ConstraintKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; ranges as in the OpenAI API."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    """Alternatives to report beside each chosen token, 0 to 20; None reports no logprobs."""
    n: int = 1
    """Answers to the one prompt; answer i is drawn with seed `noise.answer_seed(seed, i)`."""
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation.

    `prompt` is a chat (rendered by the model's own template), raw text, or token ids.
    `resume_token_ids` were already delivered: generation goes on after them; not with `n` over 1.
    `tenant` salts the prefix cache.  `deadline_ms` is how long from now the answer is wanted.
    """

    id: str
    prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]
    sampling: SamplingParams
    resume_token_ids: tuple[int, ...] = ()
    tenant: bytes = b""
    deadline_ms: int | None = None
    constraint: Constraint | None = None
    tools: ToolUse | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """One token and how likely it was."""

    token_id: int
    token: bytes
    """Its bytes; may be a part of a character."""
    logprob: float
    """Natural logarithm, of the model's own distribution: before temperature and penalties."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token and the likeliest ones in its place, most likely first."""

    chosen: Alternative
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call, as OpenAI streams them: the first of a call has its name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one engine step brought one answer of a request.

    `text` may be empty while a UTF-8 character or a possible stop string is held back.  The event
    that carries `finish_reason` is the answer's last; `error` says why when that is ERROR.
    `input_tokens` and `cached_tokens` are exact and in every event.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    input_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    index: int = 0
    """Which of the request's `n` answers."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token id, if they were asked for."""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts or token ids to be embedded."""

    id: str
    inputs: tuple[str | tuple[int, ...], ...]
    deadline_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector of unit length per input, in the order of the inputs."""

    vectors: tuple[tuple[float, ...], ...]
    input_tokens: int


@dataclass(frozen=True, slots=True)
class StepFrame:
    """Everything that one engine step produced, for all requests in it."""

    events: tuple[TokenEvent, ...]


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """What the bid is made of, and the metrics page shows."""

    ready: bool
    running: int
    queued: int
    capacity: int
    """How many generations may run at once."""
    context_window: int
    tokens_per_second: float
    ttft_estimate_ms: int
    restarts: int
    generated_tokens: int
    device: str
    dtype: str
    load_progress: float = 1.0
    """0 to 1 while the model is being loaded."""
    kv_blocks: int = 0
    """Blocks of the KV cache."""
    kv_blocks_free: int = 0
    """Of these, neither in use nor holding a prefix worth keeping."""
    input_tokens: int = 0
    """Prompt tokens of all requests so far."""
    cached_tokens: int = 0
    """Of these, what the prefix cache had."""
    prefix_horizon_s: float = 0.0
    """Prefixes used within so many seconds are still in the cache; infinite if none was evicted,
    0 if this engine keeps none."""
    preemptions: int = 0
    """Sequences that had to give their blocks back and be computed again."""


class EngineError(Exception):
    """The engine could not answer."""


class EngineDead(EngineError):
    """The engine process ended or hangs; it is being restarted."""


class EngineBusy(EngineError):
    """No room for one more request now."""


class PromptRefused(EngineError):
    """This prompt cannot be run: too long for the context window, or the model has no template."""


class Engine(Protocol):
    """One model, ready to generate."""

    def generate(
        self, request: GenerationRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[TokenEvent]]:
        """Start a generation; leaving the context cancels it at the next step.

        Raises EngineBusy or PromptRefused on entry, EngineDead on entry or while iterating.
        """
        ...

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """The vectors; raises EngineBusy, PromptRefused or EngineDead.  Cancelling it is safe."""
        ...

    async def wait_ready(self) -> None:
        """Wait until the model is loaded; raises EngineDead if it cannot be."""
        ...

    def statistics(self) -> EngineStatistics:
        """A snapshot, at once."""
        ...
