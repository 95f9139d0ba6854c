"""Getting out through an HTTP proxy, for those whose network lets nobody out in another way."""

from __future__ import annotations

import base64
from typing import Final
from urllib.parse import unquote, urlsplit

import trio

from pinaivu_node.mesh.mesh import MeshError

_MAX_ANSWER_BYTES: Final = 16 * 1024
"""Of a proxy's answer, its headers included."""


class HttpProxy:
    """Asks a proxy to CONNECT.  `url`: http://host:3128, or http://name:password@host:3128.

    Raises MeshError if it is no such URL.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port or 3128
        except ValueError:
            parts, port = urlsplit(""), 0
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise MeshError("that is no HTTP proxy: write it like http://proxy.example.org:3128")
        self._host = parts.hostname
        self._port = port
        self._authorization = ""
        if parts.username is not None:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            encoded = base64.b64encode(secret.encode()).decode()
            self._authorization = f"Proxy-Authorization: Basic {encoded}\r\n"

    async def connect(self, host: str, port: int) -> trio.SocketStream:
        """A stream to this host, through the proxy; OSError if there is none."""
        stream = await trio.open_tcp_stream(self._host, self._port)
        try:
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            request = f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n{self._authorization}\r\n"
            await stream.send_all(request.encode("ascii"))
            _check_untrusted(await _head_of(stream))
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream


async def _head_of(stream: trio.SocketStream) -> bytes:
    """The proxy's answer up to its empty line.

    Nothing can come behind it: whoever we are connected with waits for us to speak.
    """
    head = b""
    while b"\r\n\r\n" not in head:
        try:
            data = await stream.receive_some(_MAX_ANSWER_BYTES)
        except trio.BrokenResourceError as exc:
            raise OSError("the proxy hung up") from exc
        if not data or len(head) > _MAX_ANSWER_BYTES:
            raise OSError("the proxy did not answer as a proxy does")
        head += data
    return head


def _check_untrusted(head: bytes) -> None:
    words = head.split(b"\r\n", 1)[0].split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].startswith(b"2"):
        answer = b" ".join(words[1:])[:80].decode("ascii", "replace")
        raise OSError(f"the proxy refused: {answer}")
