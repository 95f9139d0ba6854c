"""A load of many streams, and the plain server they are compared with, both on bare sockets.

The client is as thin as can be, so that what is measured is the server.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio


@dataclass(frozen=True, slots=True)
class Relayed:
    """What came through in one run."""

    streams: int
    tokens: int
    events: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Over all streams, first request to last byte."""
        return self.tokens / self.seconds


class Connection:
    """One kept connection, as an SDK's pool holds it; one request at a time."""

    def __init__(self, port: int, stream: trio.SocketStream, *, api_key: str) -> None:
        self._port = port
        self._stream = stream
        self._api_key = api_key

    async def ask(
        self, body: dict[str, Any], *, path: str = "/v1/chat/completions"
    ) -> tuple[float, bytes]:
        """One streamed request: the seconds to its first token, and everything received."""
        payload = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
            f"Authorization: Bearer {self._api_key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        ).encode()
        started = time.perf_counter()
        await self._stream.send_all(head + payload)
        received = bytearray()
        first_token = 0.0
        while not received.endswith(b"0\r\n\r\n"):
            chunk = await self._stream.receive_some(65536)
            received += chunk
            if not chunk or not received.startswith(b"HTTP/1.1 200"[: len(received)]):
                raise RuntimeError(f"no stream: {bytes(received[:500])!r}")
            if not first_token and b'"content":"' in received.replace(b'"content":""', b""):
                first_token = time.perf_counter() - started
        return first_token, bytes(received)


@asynccontextmanager
async def connect(port: int, *, api_key: str) -> AsyncIterator[Connection]:
    """A connection to a server on this machine."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield Connection(port, stream, api_key=api_key)


async def relay(port: int, *, api_key: str, streams: int, tokens: int, model: str) -> Relayed:
    """Run that many streams at once, each of that many tokens."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "measure"}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    totals = [0, 0]

    async def one() -> None:
        async with connect(port, api_key=api_key) as connection:
            _, received = await connection.ask(body)
        totals[0] += _completion_tokens(received)
        totals[1] += received.count(b"data: {")

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(streams):
            nursery.start_soon(one)
    return Relayed(streams, totals[0], totals[1], time.perf_counter() - started)


def _completion_tokens(received: bytes) -> int:
    marker = b'"completion_tokens":'
    at = received.rindex(marker) + len(marker)
    return int(received[at : at + 12].split(b",")[0].split(b"}")[0])


async def serve_plain(tokens: int, *, port: int) -> None:
    """The bound: a trio server without HTTP library, auction or mesh, writing the same chunks."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            request = b""
            while b"\r\n\r\n" not in request:
                request += await stream.receive_some(65536)
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
            )
            for number in range(tokens):
                await stream.send_all(_chunk(_token_event(number)))
            await stream.send_all(
                _chunk(b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n' % tokens)
                + _chunk(b"data: [DONE]\n\n")
                + b"0\r\n\r\n"
            )

    await trio.serve_tcp(serve, port, host="127.0.0.1")


def _token_event(number: int) -> bytes:
    return (
        b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":'
        b'"chat.completion.chunk","created":1700000000,"model":"bench","request_id":'
        b'"req_0123456789abcdef0123456789abcdef","system_fingerprint":"fp_0123456789",'
        b'"choices":[{"index":0,"delta":{"content":" t%d"},"logprobs":null,'
        b'"finish_reason":null}]}\n\n' % number
    )


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


if __name__ == "__main__":
    trio.run(partial(serve_plain, int(sys.argv[1]), port=int(sys.argv[2])))
