"""Bytes to messages and back: MessagePack framing with one untrusted door.

A message on a stream or on gossip is the two-element array `[kind, fields]`.  A body, the part
that a signature covers, is `fields` alone: the kind is named by the envelope around it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar

import msgpack
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pinaivu_node.protocol.errors import LocalProtocolError, RemoteProtocolError

MAX_MESSAGE_BYTES: Final = 1 << 20
"""The longest message: what gossipsub delivers in one piece, and 2 s of a 4 Mbit/s uplink."""

_MAX_ITEMS: Final = 1 << 17
"""Longest array in a message: the token ids of a 128k-token prompt."""


E = TypeVar("E", bound=StrEnum)


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("not a word")  # noqa: TRY004 - pydantic translates only ValueError
    return value


Word = Annotated[E, Field(strict=False), BeforeValidator(_text)]
"""One of the words of an enum, as text: not being strict, pydantic would take its bytes too."""


class Record(BaseModel):
    """A frozen, strict, closed struct; part of a message.

    Its lists are declared with `fail_fast`: a hostile one of 100,000 wrong items is refused at the
    first instead of costing a second of error objects.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Message(Record):
    """Something a peer says.  `kind` is its name and version on the wire."""

    kind: ClassVar[str]

    def __init_subclass__(cls, *, kind: str, **config: Any) -> None:
        """Name the message; every subclass must."""
        super().__init_subclass__(**config)
        cls.kind = kind

    @classmethod
    def from_body_untrusted(cls, body: bytes) -> Self:
        """Decode a body; raises only RemoteProtocolError, whatever the bytes."""
        return _validated(cls, _unpacked(body))


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The bytes of a message; LocalProtocolError if no peer would take them."""
    return _packed([message.kind, message.model_dump()])


def encode_body(record: Record) -> bytes:
    """The bytes that a signature or a digest covers."""
    return _packed(record.model_dump())


def decode_untrusted(data: bytes, *expected: type[M]) -> M:
    """The one door: hostile bytes to one of the expected messages, or RemoteProtocolError."""
    unpacked = _unpacked(data)
    if not isinstance(unpacked, tuple) or len(unpacked) != 2:
        raise RemoteProtocolError("a message is an array of its kind and its fields")
    kind, fields = unpacked
    for message in expected:
        if message.kind == kind:
            return _validated(message, fields)
    wanted = ", ".join(message.kind for message in expected)
    # Only text is shown: spelling out a kind nested 1,000 deep would overflow the stack.
    shown = repr(kind[:40]) if isinstance(kind, str) else f"a {type(kind).__name__}"
    raise RemoteProtocolError(f"expected one of {wanted}, not {shown}")


def _packed(value: object) -> bytes:
    try:
        data: bytes = msgpack.packb(value)
    except (TypeError, ValueError, OverflowError) as exc:
        raise LocalProtocolError(f"unencodable message: {exc}") from exc
    if len(data) > MAX_MESSAGE_BYTES:
        raise LocalProtocolError(f"a message of {len(data)} bytes is over the limit")
    return data


def _unpacked(data: bytes) -> Any:
    if len(data) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"a message of {len(data)} bytes is over the limit")
    try:
        return msgpack.unpackb(
            data,
            use_list=False,
            object_pairs_hook=_fields,
            strict_map_key=True,
            max_array_len=_MAX_ITEMS,
            max_map_len=256,
            max_ext_len=0,
        )
    except (msgpack.UnpackException, ValueError, TypeError, RecursionError, OverflowError) as exc:
        raise RemoteProtocolError(f"not MessagePack: {str(exc)[:120]}") from exc


def _fields(pairs: list[tuple[str | bytes, object]]) -> dict[str | bytes, object]:
    """The map; ValueError if a key is there twice, since not all readers take the same one."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a map with the same key twice")
    return fields


def _validated(message: type[M], fields: Any) -> M:
    if not isinstance(fields, dict):
        raise RemoteProtocolError(f"the fields of {message.kind} are not a map")
    try:
        return message.model_validate(fields)
    except (ValidationError, RecursionError) as exc:
        raise RemoteProtocolError(f"malformed {message.kind}: {_first_fault(exc)}") from exc


def _first_fault(exc: Exception) -> str:
    """One short line about what is wrong; never the hostile input itself."""
    if not isinstance(exc, ValidationError):
        return "nested too deeply"
    fault = exc.errors(include_url=False, include_input=False, include_context=False)[0]
    # The last part may be a name that the peer made up: control characters and all.
    where = ".".join(str(part)[:40] for part in fault["loc"][:6]) or "fields"
    return f"{ascii(where)[1:-1][:120]}: {fault['msg'][:120]}"
