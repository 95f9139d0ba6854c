"""Three ways to carry frames between two processes: plain TCP on trio, stock py-libp2p, our mesh.

All three speak the frames of `mesh.framing`, and each is used as its own users would.  Run as
`python -m scripts.benchmarks.stacks NAME`, a process serves its side and prints its address.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import trio

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.framing import FrameDecoder, encode_frame
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.mesh import MeshError

PROTOCOL: Final = "/pinaivu/bench/1"
MANY: Final = 4096
"""Connections and streams that a server of a benchmark takes."""


class Pipe(Protocol):
    """Frames both ways."""

    async def send(self, frame: bytes) -> None:
        """Send one."""
        ...

    async def receive(self) -> bytes:
        """The next."""
        ...


Serve = Callable[[Pipe], Awaitable[None]]
Gone = (MeshError, OSError, EOFError, trio.BrokenResourceError, trio.ClosedResourceError)


class Client(Protocol):
    """One connection to a serving process, and streams on it."""

    async def dial(self) -> None:
        """Connect anew."""
        ...

    async def hang_up(self) -> None:
        """Undo `dial`."""
        ...

    async def open(self) -> Pipe:
        """A stream."""
        ...


class BytePipe:
    """Frames on anything with a `read` and a `write`."""

    def __init__(self, read: Callable[[], Awaitable[bytes]], write: Any) -> None:
        self._read, self._write = read, write
        self._decoder = FrameDecoder()
        self._frames: deque[Any] = deque()

    async def send(self, frame: bytes) -> None:
        """See `Pipe`."""
        await self._write(encode_frame(frame))

    async def receive(self) -> bytes:
        """See `Pipe`."""
        while not self._frames:
            data = await self._read()
            if not data:
                raise EOFError
            self._frames.extend(self._decoder.feed_untrusted(data))
        frame: bytes = self._frames.popleft()
        return frame


# --- plain TCP ------------------------------------------------------------------------------------


async def _serve_plain(serve: Serve) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        await serve(BytePipe(functools.partial(stream.receive_some, 65536), stream.send_all))

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1024)
    _tell(str(listener.socket.getsockname()[1]))
    await trio.serve_listeners(handle, [listener])


class _PlainClient:
    """A stream is a connection of its own: there is nothing that shares one."""

    def __init__(self, address: str) -> None:
        self._port = int(address)

    async def dial(self) -> None:
        self._stream = await trio.open_tcp_stream("127.0.0.1", self._port)

    async def hang_up(self) -> None:
        await self._stream.aclose()

    async def open(self) -> Pipe:
        stream = await trio.open_tcp_stream("127.0.0.1", self._port)
        return BytePipe(functools.partial(stream.receive_some, 65536), stream.send_all)


@asynccontextmanager
async def _plain_client(address: str) -> AsyncIterator[Client]:
    yield _PlainClient(address)


# --- stock py-libp2p ------------------------------------------------------------------------------


@asynccontextmanager
async def stock_host(listen: list[str]) -> AsyncIterator[Any]:
    """A py-libp2p host as it comes, but for Noise alone and no limit of connections."""
    import libp2p
    import libp2p.network.swarm as swarm_module
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_noise_keys
    from libp2p.network.config import ConnectionConfig
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport
    from multiaddr import Multiaddr

    from pinaivu_node.mesh.libp2p import host as ours

    ours.silence()
    # As it comes: our own host, which may have run in this process, takes the delay away.
    swarm_module._HAPPY_EYEBALLS_DELAY = 0.25  # noqa: SLF001
    keys = create_new_key_pair(seed=os.urandom(32))
    host = libp2p.new_host(
        key_pair=keys,
        sec_opt={PROTOCOL_ID: Transport(keys, noise_privkey=create_noise_keys().private_key)},
        # Its inbound limiter counts connections of the past: without this it stops at 250.
        connection_config=ConnectionConfig(
            max_connections=MANY, min_connections=0, low_watermark=0
        ),
    )
    host.get_network().set_resource_manager(None)
    async with host.run([Multiaddr(address) for address in listen]):
        yield host


async def _serve_stock(serve: Serve) -> None:
    async with stock_host(["/ip4/127.0.0.1/tcp/0"]) as host:

        async def handle(stream: Any) -> None:
            await serve(BytePipe(functools.partial(stream.read, 65536), stream.write))

        host.set_stream_handler(PROTOCOL, handle)
        _tell(str(host.get_addrs()[0]))
        await trio.sleep_forever()


class _StockClient:
    def __init__(self, host: Any, address: str) -> None:
        from libp2p.peer.peerinfo import info_from_p2p_addr
        from multiaddr import Multiaddr

        self._host = host
        self._peer = info_from_p2p_addr(Multiaddr(address))

    async def dial(self) -> None:
        await self._host.connect(self._peer)

    async def hang_up(self) -> None:
        await self._host.disconnect(self._peer.peer_id)

    async def open(self) -> Pipe:
        stream = await self._host.new_stream(self._peer.peer_id, [PROTOCOL])
        return BytePipe(functools.partial(stream.read, 65536), stream.write)


@asynccontextmanager
async def _stock_client(address: str) -> AsyncIterator[Client]:
    async with stock_host([]) as host:
        yield _StockClient(host, address)


# --- ours -----------------------------------------------------------------------------------------

_CONFIG: Final = MeshConfig(hub=True, max_connections=MANY, max_streams_per_peer=MANY)


async def _serve_ours(serve: Serve) -> None:
    async with open_libp2p_mesh(_CONFIG, seed=os.urandom(32)) as mesh:
        mesh.handle(PROTOCOL, serve)
        _tell(mesh.addresses[0])
        await trio.sleep_forever()


class _OurClient:
    def __init__(self, mesh: Any, address: str) -> None:
        self._mesh, self._address = mesh, address
        self._peer = address.rpartition("/p2p/")[2]

    async def dial(self) -> None:
        await self._mesh.dial(self._address)

    async def hang_up(self) -> None:
        await self._mesh.disconnect(self._peer)

    async def open(self) -> Pipe:
        pipe: Pipe = await self._mesh.open(self._peer, PROTOCOL)
        return pipe


@asynccontextmanager
async def _our_client(address: str) -> AsyncIterator[Client]:
    config = _CONFIG.model_copy(update={"listen": ()})
    async with open_libp2p_mesh(config, seed=os.urandom(32)) as mesh:
        yield _OurClient(mesh, address)


# --- what a server does ---------------------------------------------------------------------------


async def serve_bench(pipe: Pipe) -> None:
    """Do what the first frame of a stream asks for, until the stream is gone."""
    try:
        order = json.loads(await pipe.receive())
        await _ORDERS[order.pop("order")](pipe, **order)
    except Gone:
        pass
    except Exception as exc:
        if "tream" not in f"{exc!r}":  # libp2p raises a dozen kinds, all of one meaning
            raise


async def _echo(pipe: Pipe) -> None:
    while True:
        await pipe.send(await pipe.receive())


async def _sink(pipe: Pipe, count: int) -> None:
    for _ in range(count):
        await pipe.receive()
    await pipe.send(b"all of them")
    await pipe.receive()


async def _source(pipe: Pipe, count: int, size: int, every: float) -> None:
    frame = bytes(size)
    start = trio.current_time()
    for number in range(count):
        await trio.sleep_until(start + number * every)
        await pipe.send(frame)
    await pipe.receive()


async def _flood(pipe: Pipe, size: int) -> None:
    while True:
        await pipe.send(bytes(size))


_ORDERS: Final[dict[str, Callable[..., Awaitable[None]]]] = {
    "echo": _echo,
    "sink": _sink,
    "source": _source,
    "flood": _flood,
}
SERVERS: Final[dict[str, Callable[[Serve], Awaitable[None]]]] = {
    "plain": _serve_plain,
    "stock": _serve_stock,
    "ours": _serve_ours,
}
CLIENTS: Final[dict[str, Any]] = {
    "plain": _plain_client,
    "stock": _stock_client,
    "ours": _our_client,
}


def _tell(address: str) -> None:
    print(address, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    trio.run(SERVERS[sys.argv[1]], serve_bench)
