"""What daemon and engine child say to each other, and how it is written on their pipes.

A frame is a 4-byte big-endian length and a msgpack array: a tag, then the fields in order.  The
codec is pure.  `FrameDecoder` accepts bytes in any pieces; whatever the bytes, it fails only with
`FrameError`: a child whose memory is corrupt is to be restarted, not to take the daemon with it.

    daemon → child    Load, then Generate, Cancel, Ping in any order
    child → daemon    Ready or LoadFailed, then per Generate one Accepted or Refused, and for the
                      accepted ones events in StepFrames up to a finish reason; Pong per Ping
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from pinaivu_node.engine.types import (
    ChatMessage,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StepFrame,
    TokenEvent,
)

MAX_FRAME_BYTES: Final = 16 * 2**20
"""A prompt of a million token ids takes 5 MB; nothing that is said here is larger."""
_LENGTH: Final = struct.Struct(">I")


class FrameError(Exception):
    """These bytes are no frame: the other end is broken."""


@dataclass(frozen=True, slots=True)
class Load:
    """Load this model; the first frame a child hears.  `config` is an EngineConfig as JSON."""

    config: str


@dataclass(frozen=True, slots=True)
class Generate:
    """Start this generation."""

    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a generation; it still ends with an event, CANCELLED unless it was faster."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Say that the step loop lives."""

    number: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and warm; what was found out about it."""

    device: str
    dtype: str
    capacity: int
    context_window: int
    tokens_per_second: float
    ttft_ms: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The model cannot be loaded; the child exits after saying why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """The prompt fits; tokens will follow."""

    request_id: str
    input_tokens: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The prompt cannot be run."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Pong:
    """The step loop lives; also said between the prefill chunks of a long prompt."""

    number: int


ToChild = Load | Generate | Cancel | Ping
ToParent = Ready | LoadFailed | Accepted | Refused | Pong | StepFrame
Frame = ToChild | ToParent

_FLAT: Final[dict[str, type[Any]]] = {
    "load": Load,
    "cancel": Cancel,
    "ping": Ping,
    "ready": Ready,
    "load-failed": LoadFailed,
    "accepted": Accepted,
    "refused": Refused,
    "pong": Pong,
}
_FLAT_TAGS: Final = {frame_type: tag for tag, frame_type in _FLAT.items()}
_SAMPLING_FIELDS: Final = tuple(f.name for f in dataclasses.fields(SamplingParams))


def encode(frame: Frame) -> bytes:
    """The frame as it goes on the pipe; FrameError if it is too large or no msgpack can say it."""
    match frame:
        case StepFrame(events=events):
            fields: list[Any] = ["step", [_event_fields(event) for event in events]]
        case Generate(request=request):
            fields = ["generate", *_request_fields(request)]
        case _:
            names = (field.name for field in dataclasses.fields(frame))
            fields = [_FLAT_TAGS[type(frame)], *(getattr(frame, name) for name in names)]
    try:
        body = msgpack.packb(fields)
    except (ValueError, OverflowError) as exc:  # a lone surrogate in a text, an integer of 65 bits
        raise FrameError(str(exc)) from exc
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + bytes(body)


class FrameDecoder:
    """Bytes in, frames out.  After a FrameError the stream is lost."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Every frame that these bytes complete, in order; iterate to the end."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame announces {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield _decode(body)


def _decode(body: bytes) -> Frame:
    try:
        tag, *fields = msgpack.unpackb(body, use_list=False, strict_map_key=False)
        if tag in _FLAT:
            return _flat(_FLAT[tag], fields)
        return _NESTED[tag](fields)
    # RecursionError is a RuntimeError; UnpackException and StackError are ValueErrors or its kin.
    except (msgpack.UnpackException, ValueError, TypeError, KeyError, RecursionError) as exc:
        raise FrameError(f"undecodable frame: {exc!r}") from exc


_FIELD_TYPES: Final[dict[str, type[Any] | tuple[type[Any], ...]]] = {
    "str": str,
    "int": int,
    "float": (float, int),
}


def _flat(frame_type: type[Any], fields: list[Any]) -> Frame:
    declared = dataclasses.fields(frame_type)
    if len(declared) != len(fields):
        raise ValueError(f"{frame_type.__name__} has {len(declared)} fields")
    for field, value in zip(declared, fields, strict=True):
        # Annotations are strings here (PEP 563); the flat frames hold these three types only.
        if not isinstance(value, _FIELD_TYPES[str(field.type)]):
            raise TypeError(f"{frame_type.__name__}.{field.name} is {type(value).__name__}")
    frame: Frame = frame_type(*fields)
    return frame


def _event_fields(event: TokenEvent) -> list[Any]:
    reason = event.finish_reason
    return [
        event.request_id,
        event.token_ids,
        event.text,
        event.input_tokens,
        event.cached_tokens,
        None if reason is None else reason.value,
        event.error,
    ]


def _event(fields: tuple[Any, ...]) -> TokenEvent:
    request_id, token_ids, text, input_tokens, cached_tokens, reason, error = fields
    return TokenEvent(
        request_id=_text(request_id),
        token_ids=_integers(token_ids),
        text=_text(text),
        input_tokens=_integer(input_tokens),
        cached_tokens=_integer(cached_tokens),
        finish_reason=None if reason is None else FinishReason(reason),
        error=None if error is None else _text(error),
    )


def _step(fields: list[Any]) -> StepFrame:
    (events,) = fields
    return StepFrame(tuple(_event(event) for event in events))


def _request_fields(request: GenerationRequest) -> list[Any]:
    match request.prompt:
        case str(text):
            prompt: Any = text
        case tuple(parts):
            prompt = [
                [part.role, part.content] if isinstance(part, ChatMessage) else part
                for part in parts
            ]
    # Any mapping and any integer may be asked for; noise takes the low 64 bits of a seed anyway.
    sampling = dataclasses.replace(
        request.sampling,
        logit_bias=dict(request.sampling.logit_bias),
        seed=request.sampling.seed & (2**64 - 1),
    )
    return [
        request.id,
        prompt,
        [getattr(sampling, name) for name in _SAMPLING_FIELDS],
        request.resume_token_ids,
        request.tenant,
        request.deadline_ms,
    ]


def _generate(fields: list[Any]) -> Generate:
    request_id, prompt, sampling, resume, tenant, deadline = fields
    return Generate(
        GenerationRequest(
            id=_text(request_id),
            prompt=_prompt(prompt),
            sampling=SamplingParams(**dict(zip(_SAMPLING_FIELDS, sampling, strict=True))),
            resume_token_ids=_integers(resume),
            tenant=bytes(tenant),
            deadline_ms=None if deadline is None else _integer(deadline),
        )
    )


def _prompt(prompt: Any) -> tuple[ChatMessage, ...] | str | tuple[int, ...]:
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], tuple):
        return tuple(ChatMessage(_text(role), _text(content)) for role, content in prompt)
    return _integers(prompt)


_NESTED: Final[dict[str, Callable[[list[Any]], Frame]]] = {"step": _step, "generate": _generate}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text expected, not {type(value).__name__}")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"an integer expected, not {type(value).__name__}")
    return value


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(_integer(value) for value in values)
