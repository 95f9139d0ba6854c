"""Reading what a client sends, and noticing that it has left."""

from __future__ import annotations

from typing import Final

import trio
from starlette.datastructures import Headers
from starlette.types import Receive

from pinaivu_gateway.config import HttpConfig
from pinaivu_gateway.errors import CLOSE, INVALID, Problem, RequestRefused

DISCARD_BYTES: Final = 8 << 20
DISCARD_SECONDS: Final = 2.0
"""So much of an oversize body is read on before the answer: a connection that is closed with
unread bytes is reset, and the client would see that instead of the answer."""


class ClientGone(Exception):
    """The client has left; nobody is there to be answered."""


async def read_body(receive: Receive, headers: Headers, config: HttpConfig) -> bytes:
    """The whole body.  Raises RequestRefused (413, 415, too slow) and ClientGone.

    Afterwards `receive` returns only when the client leaves.
    """
    _refuse_foreign_content(headers)
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > config.max_body_bytes:
        await _discard(receive)
        raise _too_large(config)
    with trio.move_on_after(config.body_timeout):
        return await _gather(receive, config)
    raise RequestRefused(
        Problem(400, "The request body did not arrive in time.", headers=dict(CLOSE))
    )


async def wait_until_gone(receive: Receive) -> None:
    """Return when the client leaves.  On trio `Request.is_disconnected` never notices it."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _gather(receive: Receive, config: HttpConfig) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > config.max_body_bytes:
            await _discard(receive)
            raise _too_large(config)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _discard(receive: Receive) -> None:
    size = 0
    with trio.move_on_after(DISCARD_SECONDS):
        while size < DISCARD_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return
            size += len(message.get("body", b""))


def _too_large(config: HttpConfig) -> RequestRefused:
    message = f"The request body is larger than {config.max_body_bytes} bytes."
    return RequestRefused(
        Problem(413, message, "request_too_large", None, INVALID, headers=dict(CLOSE))
    )


def _refuse_foreign_content(headers: Headers) -> None:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise _unsupported(f"Content-Encoding {encoding[:40]!r} is not understood: send it plain.")
    kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind not in ("", "application/json") and not kind.endswith("+json"):
        raise _unsupported(
            f"Content-Type {kind[:60]!r} is not understood: send application/json "
            "(curl: -H 'Content-Type: application/json')."
        )


def _unsupported(message: str) -> RequestRefused:
    return RequestRefused(Problem(415, message, headers=dict(CLOSE)))
