"""WebSocket: a transport for peers that get out through HTTP ports only.

    /ip4/…/tcp/80/ws     /ip4/…/tcp/443/wss     /dns4/…/tcp/443/wss     …/tls/ws is the same as wss

Bytes go in binary messages, cut anywhere; Noise and Yamux inside are those of every connection, so
what a TLS certificate says of a host is nothing to us: who is there is proven within.  It is not
verified, since those who need this transport sit behind boxes that open TLS and seal it again, or
dial an address for which nobody would sign.

wsproto reads and writes the frames, with no task and no queue between us and the socket.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import trio
from h11 import ProtocolError
from libp2p.abc import IListener, ITransport
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr
from wsproto import WSConnection
from wsproto.connection import ConnectionType
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    Request,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from pinaivu_node.mesh.libp2p.proxy import HttpProxy
from pinaivu_node.mesh.mesh import MeshError

logger = logging.getLogger(__name__)

Accept = Callable[["WebSocketStream"], Awaitable[None]]

_ALPN: Final = ["http/1.1"]
_READ_BYTES: Final = 64 * 1024
_HOSTS: Final = ("ip4", "ip6", "dns4", "dns6", "dns")
_LOST: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
# A header that is no ASCII is a ValueError; wsproto lets h11's own errors pass too.
_BROKEN: Final = (RemoteProtocolError, LocalProtocolError, ProtocolError, ValueError)


class WebSocketStream(ReadWriteCloser):  # type: ignore[misc] # untyped base
    """The bytes of one WebSocket, in the shape that libp2p wants a socket to have.

    A listener's shakes hands when it is first used, so that whoever bounds handshakes bounds this.
    From then on one task may read and another write; a cancelled write leaves it unusable.
    """

    def __init__(self, transport: trio.abc.Stream, kind: ConnectionType, remote: Any) -> None:
        self._transport = transport
        self._protocol = WSConnection(kind)
        self._is_client = kind is ConnectionType.CLIENT
        self._remote = remote
        self._upgraded = False
        self._sending = trio.Lock()

    async def upgrade(self, host: str) -> None:
        """As the client, ask for a WebSocket; ConnectionClosedError if there is none."""
        await self._send(Request(host=host, target="/"))
        await self._upgrade()

    async def read(self, n: int | None = None) -> bytes:
        """What has arrived, at least a byte and about `n` at most; empty at the end."""
        if not self._upgraded:
            await self._upgrade()
        while True:
            arrived = await self._take_in_untrusted()
            if arrived:
                return arrived
            data = await self._receive(n or _READ_BYTES)
            if not data:
                return b""

    async def write(self, data: bytes) -> None:
        """Send this as one message; ConnectionClosedError if it cannot be."""
        if not self._upgraded:
            await self._upgrade()
        await self._send(BytesMessage(data=data))

    async def close(self) -> None:
        """Break off: whoever reads or writes gets an error."""
        await trio.aclose_forcefully(self._transport)

    def get_remote_address(self) -> Any:
        """Host and port of the peer, or of the proxy before us."""
        return self._remote

    async def _upgrade(self) -> None:
        while not self._upgraded:
            data = await self._receive(_READ_BYTES)
            if not data:
                raise ConnectionClosedError("it hung up before there was a WebSocket")
            for event in self._events_untrusted():
                match event:
                    case Request():
                        self._upgraded = True
                        await self._send(AcceptConnection())
                    case AcceptConnection():
                        self._upgraded = True
                    case RejectConnection(status_code=status):
                        raise ConnectionClosedError(f"it answered {status} and no WebSocket")
                    case _:
                        raise ConnectionClosedError("it broke the WebSocket handshake")
                if self._upgraded:
                    return  # what came behind it stays in the protocol, to be read

    async def _take_in_untrusted(self) -> bytes:
        pieces = []
        for event in self._events_untrusted():
            match event:
                case BytesMessage(data=data):
                    pieces.append(data)
                case Ping():
                    await self._send(event.response())
                case CloseConnection():
                    raise ConnectionClosedError("the peer closed the WebSocket")
                case _:
                    pass
        return b"".join(pieces)

    def _events_untrusted(self) -> Any:
        try:
            yield from self._protocol.events()
        except _BROKEN as exc:
            raise ConnectionClosedError(f"it broke the WebSocket: {exc}") from exc

    async def _receive(self, limit: int) -> bytes:
        try:
            data = await self._transport.receive_some(limit)
        except _LOST as exc:
            raise ConnectionClosedError(f"the socket was lost: {exc}") from exc
        try:
            self._protocol.receive_data(bytes(data) or None)
        except _BROKEN as exc:
            await self._refuse(exc)
            raise ConnectionClosedError(f"it broke the WebSocket: {exc}") from exc
        return bytes(data)

    async def _refuse(self, fault: Exception) -> None:
        """Answer what was no WebSocket request, such as a browser's, as HTTP wants it."""
        hint = getattr(fault, "event_hint", None)
        if isinstance(hint, RejectConnection) and not self._is_client:
            await self._send(hint)

    async def _send(self, event: Event) -> None:
        async with self._sending:
            try:
                await self._transport.send_all(self._protocol.send(event))
            except (*_LOST, *_BROKEN) as exc:
                raise ConnectionClosedError(f"the WebSocket takes no more: {exc}") from exc


class _Listener(IListener):  # type: ignore[misc] # untyped base
    def __init__(self, accept: Accept, server: ssl.SSLContext | None) -> None:
        self.background_nursery: trio.Nursery  # set by the swarm before it calls `listen`
        self._accept = accept
        self._server = server
        self._listeners: list[trio.SocketListener] = []
        self._scope = trio.CancelScope()
        self._suffix = "ws"
        self._context: ssl.SSLContext | None = None

    async def listen(self, maddr: Any) -> None:
        """Accept connections in the nursery of the swarm; OSError if the port is taken."""
        host, port, secure = _where(maddr)
        if secure:
            self._suffix, self._context = "wss", self._server
        self._listeners = list(await trio.open_tcp_listeners(port, host=host))
        self.background_nursery.start_soon(self._serve)

    def get_addrs(self) -> tuple[Any, ...]:
        """What we listen on."""
        return tuple(
            Multiaddr(
                f"/{'ip6' if ':' in name[0] else 'ip4'}/{name[0]}/tcp/{name[1]}/{self._suffix}"
            )
            for name in (listener.socket.getsockname() for listener in self._listeners)
        )

    async def close(self) -> None:
        """Release the port; connections stay."""
        self._scope.cancel()
        for listener in self._listeners:
            await listener.aclose()
        self._listeners.clear()

    async def _serve(self) -> None:
        with self._scope:
            await trio.serve_listeners(
                self._on_connection, self._listeners, handler_nursery=self.background_nursery
            )

    async def _on_connection(self, stream: trio.SocketStream) -> None:
        try:
            remote = stream.socket.getpeername()[:2]
            transport = _secured(stream, self._context, server=True)
            await self._accept(WebSocketStream(transport, ConnectionType.SERVER, remote))
        except Exception as exc:  # noqa: BLE001 - whatever a peer can do to a handshake
            logger.debug("a WebSocket was lost: %r", exc)
        finally:
            await trio.aclose_forcefully(stream)


class WebSocketTransport(ITransport):  # type: ignore[misc] # untyped base
    """Dials, through `proxy` if there is one, and listens.

    `server` holds the certificate, without which nobody listens on wss.
    """

    def __init__(self, server: ssl.SSLContext | None, proxy: HttpProxy | None) -> None:
        self._server = server
        self._connect = trio.open_tcp_stream if proxy is None else proxy.connect
        self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._client.check_hostname = False  # see the module: Noise proves who is there
        self._client.verify_mode = ssl.CERT_NONE
        self._client.set_alpn_protocols(_ALPN)

    async def dial(self, maddr: Any) -> Any:
        """A raw connection, its WebSocket open; OpenConnectionError if there is none."""
        host, port, secure = _where(maddr)
        try:
            stream = await self._connect(host, port)
        except OSError as exc:
            raise OpenConnectionError(str(exc)) from exc
        try:
            remote = stream.socket.getpeername()[:2]
            transport = _secured(stream, self._client if secure else None, host=host)
            websocket = WebSocketStream(transport, ConnectionType.CLIENT, remote)
            await websocket.upgrade(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except BaseException as exc:
            await trio.aclose_forcefully(stream)
            if isinstance(exc, ConnectionClosedError):
                raise OpenConnectionError(str(exc)) from exc
            raise
        return RawConnection(websocket, initiator=True)

    def create_listener(self, handler_function: Accept) -> _Listener:
        """A listener that gives its connections to this handler."""
        return _Listener(handler_function, self._server)

    def can_dial(self, maddr: Any) -> bool:
        """Whether this is a WebSocket's address."""
        names = [protocol.name for protocol in maddr.protocols()]
        return "p2p-circuit" not in names and ("ws" in names or "wss" in names)

    def can_listen(self, maddr: Any) -> bool:
        """The same."""
        return self.can_dial(maddr)

    def protocols(self) -> list[str]:
        """Names of the protocols in the addresses."""
        return ["ws", "wss"]


def server_context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """What listens on wss, of files in PEM; MeshError if they cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(_ALPN)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as exc:
        raise MeshError(f"cannot use the certificate {certificate}: {exc}") from exc
    return context


def _secured(
    stream: trio.SocketStream,
    context: ssl.SSLContext | None,
    *,
    server: bool = False,
    host: str | None = None,
) -> trio.abc.Stream:
    if context is None:
        return stream
    return trio.SSLStream(
        stream,
        context,
        server_side=server,
        server_hostname=host,
        https_compatible=True,
    )


def _where(maddr: Any) -> tuple[str, int, bool]:
    """Host, port, and whether TLS is spoken there."""
    parts = {protocol.name: value for protocol, value in maddr.items()}
    host = next((parts[name] for name in _HOSTS if name in parts), None)
    if host is None or "tcp" not in parts:
        raise OpenConnectionError(f"{maddr} is no address of a WebSocket")
    return str(host), int(parts["tcp"]), "wss" in parts or "tls" in parts
