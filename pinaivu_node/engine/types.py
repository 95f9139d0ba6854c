"""What is asked of an engine and what it answers: frozen records that cross a process boundary.

`Engine` is the interface that the provider holds; `client.py` implements it over a child process
that runs a model, `openai.py` over any OpenAI-compatible local server, `synthetic.py` without a
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
    """End-of-sequence token or a stop string."""
    LENGTH = "length"
    """max_tokens, or the context window is full."""
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn, its content already plain text."""

    role: str
    content: str


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
    seed: int = 0
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation.

    `prompt` is a chat (rendered by the model's own template), raw text, or token ids.
    `resume_token_ids` were already delivered: generation goes on after them.
    `tenant` salts the prefix cache.  `deadline_ms` is how long from now the answer is wanted.
    """

    id: str
    prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]
    sampling: SamplingParams
    resume_token_ids: tuple[int, ...] = ()
    tenant: bytes = b""
    deadline_ms: int | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one engine step brought one request.

    `text` may be empty while a UTF-8 character or a possible stop string is held back.  The event
    that carries `finish_reason` is the last one; `error` says why when that is ERROR.
    `input_tokens` and `cached_tokens` are exact and in every event.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    input_tokens: int
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None


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

    async def wait_ready(self) -> None:
        """Wait until the model is loaded; raises EngineDead if it cannot be."""
        ...

    def statistics(self) -> EngineStatistics:
        """A snapshot, at once."""
        ...
