"""Serves an ASGI app on a socket, with what Hypercorn leaves to its user.

Hypercorn speaks HTTP; accepting is done here, for three bounds that it does not have: on open
connections, on a client that stops reading, and on the time that answers may take to finish when
the process stops.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator
from functools import partial
from typing import Final

import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app
from starlette.types import ASGIApp

from pinaivu_gateway.config import HttpConfig, split_address

logger = logging.getLogger(__name__)

BACKLOG: Final = 1024
"""Connections that the kernel holds while we are at our own bound."""


class ListenError(Exception):
    """The address cannot be listened on; the message says which and what to do."""


def bind(listen: str) -> socket.socket:
    """A listening socket at `host:port`; port 0 takes a free one.  Raises ListenError."""
    host, port = split_address(listen)
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        raise ListenError(f"cannot listen on {listen}: {exc.strerror}") from exc
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        if exc.errno == errno.EADDRINUSE:
            raise ListenError(
                f"{listen} is in use by another process; choose another with --listen, "
                "or port 0 for any free one"
            ) from exc
        raise ListenError(f"cannot listen on {listen}: {exc.strerror}") from exc
    return listener


def base_url(listener: socket.socket) -> str:
    """Where clients reach it: what OpenAI's clients call `base_url`."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared with, not bound to
        host = "127.0.0.1"
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


@contextlib.asynccontextmanager
async def open_http(
    app: ASGIApp, listener: socket.socket, config: HttpConfig
) -> AsyncIterator[HttpServer]:
    """Serve `app` while the context is open; the socket is closed on leaving.

    Leaving cuts what still runs: call `drain` before.
    """
    async with trio.open_nursery() as nursery:
        server = HttpServer(app, listener, config)
        nursery.start_soon(server.accept, nursery)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()
            listener.close()


class HttpServer:
    """Connections, and who may make one."""

    def __init__(self, app: ASGIApp, listener: socket.socket, config: HttpConfig) -> None:
        self._app: Final = wrap_app(app, 0, "asgi")
        self._listener: Final = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        self._config: Final = config
        self._context: Final = WorkerContext(None)
        self._hypercorn: Final = _hypercorn_config(config)
        self._places: Final = trio.Semaphore(config.max_connections)
        self._accepting: Final = trio.CancelScope()
        self._open = 0
        self._all_closed: Final = trio.Event()

    async def accept(self, nursery: trio.Nursery) -> None:
        """Take connections until `drain`."""
        with self._accepting:
            while True:
                await self._places.acquire()
                try:
                    stream = await self._listener.accept()
                except BaseException as exc:
                    self._places.release()
                    if isinstance(exc, OSError):
                        # Out of file descriptors: running answers go on and will free some.
                        logger.warning("cannot accept a connection: %s", exc)
                        await trio.sleep(0.1)
                        continue
                    raise
                nursery.start_soon(self._serve, stream)

    async def drain(self) -> None:
        """Take no more connections and requests; wait for running answers as long as configured."""
        self._accepting.cancel()
        await self._listener.aclose()
        await self._context.terminated.set()
        if self._open:
            with trio.move_on_after(self._config.drain_timeout):
                await self._all_closed.wait()

    async def _serve(self, stream: trio.SocketStream) -> None:
        patient = _PatientStream(stream, self._config.stall_limit)
        self._open += 1
        try:
            await TCPServer(self._app, self._hypercorn, self._context, ConnectionState({}), patient)
        except Exception:
            # One connection's end must not be everyone's.
            logger.exception("a connection failed")
        finally:
            stream.socket.close()  # Hypercorn's own closing awaits, so a cancelled one does nothing
            self._places.release()
            self._open -= 1
            if self._accepting.cancel_called and not self._open:
                self._all_closed.set()


class _PatientStream:
    """A socket whose sends end: a client that reads nothing for the limit is cut off.

    Hypercorn shields its sends from cancellation, so the limit cannot be set from outside.
    """

    def __init__(self, stream: trio.SocketStream, limit: float) -> None:
        self.socket: Final = stream.socket
        self._limit: Final = limit
        self.send_eof: Final = stream.send_eof
        self.aclose: Final = stream.aclose
        self.receive_some: Final = stream.receive_some
        self._send_all: Final = partial(stream.send_all)

    async def send_all(self, data: bytes) -> None:
        """Raises BrokenResourceError when the client has taken too long."""
        with trio.move_on_after(self._limit):
            await self._send_all(data)
            return
        self.socket.close()  # wakes the reader too, which then reports the client as gone
        raise trio.BrokenResourceError("the client does not read")


def _hypercorn_config(config: HttpConfig) -> Config:
    settings = Config()
    settings.keep_alive_timeout = config.keep_alive
    settings.include_server_header = False
    settings.accesslog = None  # addresses and paths of clients are nobody's business
    settings.errorlog = None
    settings.h11_max_incomplete_size = 64 << 10  # a request's head; cookies and keys are smaller
    return settings
