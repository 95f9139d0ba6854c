"""What daemon and engine child say to each other, and how it is written on their pipes.

A frame is a 4-byte big-endian length and a msgpack array: a tag, then the fields in order.  The
codec is pure.  `FrameDecoder` accepts bytes in any pieces; whatever the bytes, it fails only with
`FrameError`: a child whose memory is corrupt is to be restarted, not to take the daemon with it.

    daemon → child    Load, then Generate, Embed, Cancel, Ping in any order
    child → daemon    Loading any number of times, then Ready or LoadFailed; then
                      per Generate   one Accepted or Refused, and for an accepted one events in
                                     StepFrames until each of its answers has its finish reason
                      per Embed      Embedded until every input has its vector, or one Refused
                      per Ping       one Pong
                      and Gauges, at most every GAUGES_INTERVAL_S, while anything changes
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import msgpack

from pinaivu_node.engine import codec
from pinaivu_node.engine.types import EmbeddingRequest, Embeddings, GenerationRequest, StepFrame

MAX_FRAME_BYTES: Final = 16 * 2**20
"""A prompt of a million token ids takes 5 MB; nothing that is said here is larger."""
GAUGES_INTERVAL_S: Final = 0.1
"""A bid is made of figures no older than this; a provider makes some ten bids a second at most."""
_LENGTH: Final = struct.Struct(">I")
_EMBEDDED_FLOATS: Final = 16384
"""Components in one Embedded frame, 64 KB: the daemon's loop takes half a millisecond for them."""


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
class Embed:
    """Compute these vectors."""

    request: EmbeddingRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a request.

    Each answer of a generation still ends with an event, CANCELLED unless it was faster; an
    embedding with a Refused, unless that was.  A request that is over when the Cancel arrives stays
    over, and a later one may have its id.
    """

    request_id: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Say that the step loop lives."""

    number: int


@dataclass(frozen=True, slots=True)
class Loading:
    """How far the model is, 0 to 1, and what is being done: "reading weights"."""

    progress: float
    what: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and warm; what was found out about it.

    `tokens_per_second` and `ttft_ms` are of one short request alone.
    """

    device: str
    dtype: str
    capacity: int
    context_window: int
    tokens_per_second: float
    ttft_ms: int
    kv_blocks: int = 0


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The model cannot be loaded; the child exits after saying why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """The prompt fits; tokens will follow."""

    request_id: str
    input_tokens: int


class RefusalKind(Enum):
    """Whether to send the request elsewhere, or not at all."""

    REQUEST = "request"
    """It can never be run here: PromptRefused."""
    FULL = "full"
    """It cannot be run now: EngineBusy."""


@dataclass(frozen=True, slots=True)
class Refused:
    """This request will not be run."""

    request_id: str
    reason: str
    kind: RefusalKind = RefusalKind.REQUEST


@dataclass(frozen=True, slots=True)
class Embedded:
    """The next vectors of an embedding; `input_tokens` are those of these inputs alone."""

    request_id: str
    embeddings: Embeddings


@dataclass(frozen=True, slots=True)
class Pong:
    """The step loop lives; also said between the prefill chunks of a long prompt."""

    number: int


@dataclass(frozen=True, slots=True)
class Gauges:
    """How the engine stands: what the estimates of a bid are made of.

    Said at most every GAUGES_INTERVAL_S, and once more when the engine falls idle.
    """

    running: int
    """Sequences that hold a place: an answer of `n` each."""
    queued: int
    """Sequences that wait for a place or for blocks."""
    kv_blocks_free: int
    input_tokens: int
    """Prompt tokens of all requests of this process so far."""
    cached_tokens: int
    preemptions: int
    prefix_horizon_s: float
    prefill_tokens_per_second: float
    """Prompt tokens computed per second, smoothed over the latest chunks; 0 before the first."""
    decode_tokens_per_second: float
    """Tokens chosen since the last Gauges, of all sequences, per second of steps; 0 if none.

    The daemon counts the sequences per step by itself: from the StepFrames in between.
    """
    queued_prefill_tokens: int
    """Prompt tokens still to be computed, of the queued and of the running sequences."""


ToChild = Load | Generate | Embed | Cancel | Ping
ToParent = Loading | Ready | LoadFailed | Accepted | Refused | Embedded | Pong | Gauges | StepFrame
Frame = ToChild | ToParent

_FLAT: Final[dict[str, type[Any]]] = {
    "load": Load,
    "cancel": Cancel,
    "ping": Ping,
    "loading": Loading,
    "ready": Ready,
    "load-failed": LoadFailed,
    "accepted": Accepted,
    "pong": Pong,
    "gauges": Gauges,
}
_FLAT_TAGS: Final = {frame_type: tag for tag, frame_type in _FLAT.items()}


def embedded(request_id: str, embeddings: Embeddings) -> Iterator[Embedded]:
    """Vectors in as many frames as it takes to keep each small; the first counts the tokens."""
    vectors = embeddings.vectors
    step = max(1, _EMBEDDED_FLOATS // max(1, len(vectors[0]))) if vectors else 1
    for at in range(0, max(1, len(vectors)), step):
        tokens = embeddings.input_tokens if at == 0 else 0
        yield Embedded(request_id, Embeddings(vectors[at : at + step], tokens))


def encode(frame: Frame) -> bytes:
    """The frame as it goes on the pipe; FrameError if it is too large, or no msgpack can say it, or
    it is a request that the other end could not read: a process must not end by a wrong type.
    """
    try:
        body = msgpack.packb(_fields(frame))
    # A lone surrogate in a text, an integer of 65 bits, a number where a text should be.
    except (ValueError, OverflowError, TypeError) as exc:
        raise FrameError(str(exc)) from exc
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body  # type: ignore[no-any-return]


def _fields(frame: Frame) -> list[Any]:
    match frame:
        case StepFrame(events=events):
            return ["step", *map(codec.event_row, events)]
        case Generate(request=request):
            row = codec.request_row(request)
            codec.request_of(row)
            return ["generate", *row]
        case Embed(request=embedding):
            inputs = codec.embedding_request_row(embedding)
            codec.embedding_request_of(inputs)
            return ["embed", *inputs]
        case Embedded(request_id=request_id, embeddings=embeddings):
            return ["embedded", request_id, *codec.embeddings_row(embeddings)]
        case Refused(request_id=request_id, reason=reason, kind=kind):
            return ["refused", request_id, reason, kind.value]
        case _:
            names = (field.name for field in dataclasses.fields(frame))
            return [_FLAT_TAGS[type(frame)], *(getattr(frame, name) for name in names)]


class FrameDecoder:
    """Bytes in, frames out.  After a FrameError the stream is lost."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._held = 0
        self._needed = _LENGTH.size

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Every frame that these bytes complete, in order; iterate to the end."""
        # Most reads bring whole frames, which are decoded where they lie.  The pieces of a large
        # one are joined once, when all of them are there.
        self._pieces.append(data)
        self._held += len(data)
        if self._held < self._needed:
            return
        whole = memoryview(data if len(self._pieces) == 1 else b"".join(self._pieces))
        at = 0
        while True:
            end = at + _LENGTH.size
            if end <= len(whole):
                (length,) = _LENGTH.unpack_from(whole, at)
                if length > MAX_FRAME_BYTES:
                    raise FrameError(f"a frame announces {length} bytes")
                end += length
            if end > len(whole):
                break
            yield _decode(whole[at + _LENGTH.size : end])
            at = end
        self._pieces = [bytes(whole[at:])] if at < len(whole) else []
        self._held, self._needed = len(whole) - at, end - at


def _decode(body: memoryview) -> Frame:
    try:
        tag, *fields = msgpack.unpackb(body, use_list=False, strict_map_key=False)
        if tag in _NESTED:
            return _NESTED[tag](fields)
        return _flat(_FLAT[tag], fields)
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


def _step(fields: list[Any]) -> StepFrame:
    return StepFrame(tuple(map(codec.event_of, fields)))


def _generate(fields: list[Any]) -> Generate:
    return Generate(codec.request_of(fields))


def _embed(fields: list[Any]) -> Embed:
    return Embed(codec.embedding_request_of(fields))


def _embedded(fields: list[Any]) -> Embedded:
    request_id, *row = fields
    if not isinstance(request_id, str):
        raise TypeError("Embedded.request_id is no text")
    return Embedded(request_id, codec.embeddings_of(row))


def _refused(fields: list[Any]) -> Refused:
    request_id, reason, kind = fields
    if not (isinstance(request_id, str) and isinstance(reason, str)):
        raise TypeError("Refused.request_id or .reason is no text")
    return Refused(request_id, reason, RefusalKind(kind))


_NESTED: Final[dict[str, Callable[[list[Any]], Frame]]] = {
    "step": _step,
    "generate": _generate,
    "embed": _embed,
    "embedded": _embedded,
    "refused": _refused,
}
