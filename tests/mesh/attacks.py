"""What hostile peers do to a listening port, to be aimed at any process of ours.

Load it through the `attacks` fixture.  Every attack takes the multiaddr of its victim, returns when
it has done its worst or was cut off, and never fails because the victim defends itself.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from libp2p.pubsub.pb import rpc_pb2

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import host as libp2p_host
from pinaivu_node.mesh.libp2p.gossip import GOSSIP_PROTOCOL

MULTISTREAM = b"\x13/multistream/1.0.0\n"
NOISE = b"\x07/noise\n"
CUT_OFF = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


def host_and_port(address: str) -> tuple[str, int]:
    parts = address.split("/")
    return parts[2], int(parts[4])


# --- without an identity --------------------------------------------------------------------------


async def send_blob(address: str, blob: bytes) -> None:
    """Connect, say this, and wait to be hung up on."""
    try:
        async with await trio.open_tcp_stream(*host_and_port(address)) as stream:
            await stream.send_all(blob)
            with trio.move_on_after(0.5):
                while await stream.receive_some(65536):
                    pass
    except CUT_OFF:
        pass


async def random_megabyte(address: str) -> None:
    await send_blob(address, os.urandom(1 << 20))


async def garbage_at_every_stage(address: str) -> None:
    """Garbage instead of multistream, of the choice of security, and of the Noise handshake."""
    dice = random.Random(11)
    openings = [
        b"",
        MULTISTREAM,
        MULTISTREAM + NOISE,
        MULTISTREAM + NOISE + b"\x00\x20",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 16,
        MULTISTREAM + b"\x11/plaintext/2.0.0\n",
    ]
    async with trio.open_nursery() as nursery:
        for opening in openings:
            for size in (0, 1, 100, 70_000):
                nursery.start_soon(send_blob, address, opening + dice.randbytes(size))


@asynccontextmanager
async def half_open_connections(address: str, count: int) -> AsyncIterator[None]:
    """Hold this many connections that say nothing."""
    streams: list[trio.SocketStream] = []
    try:
        while len(streams) < count:
            streams.append(await trio.open_tcp_stream(*host_and_port(address)))
        yield
    finally:
        for stream in streams:
            await trio.aclose_forcefully(stream)


# --- with an identity -----------------------------------------------------------------------------


@asynccontextmanager
async def intruder(address: str) -> AsyncIterator[Any]:
    """A libp2p host of a stranger, connected to the victim; `.victim` is the connection."""
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    host = libp2p_host.make_host(
        os.urandom(32),
        MeshConfig(listen=()),
        gate=lambda _peer: True,
        fault=lambda *_: None,
    )
    location, _, peer = address.rpartition("/p2p/")
    async with host.run([]):
        await libp2p_host.dial(host, location, peer)
        host.victim = next(iter(host.get_network().get_connections()))
        try:
            yield host
        finally:
            await host.victim.muxed_conn.secured_conn.close()


async def as_intruder(
    address: str, attack: Callable[[Any], Awaitable[None]], *, patience: float = 5.0
) -> bool:
    """Run an attack over one connection; return whether the victim hung up soon after."""
    async with intruder(address) as host:
        closed = host.victim.muxed_conn.event_closed
        async with trio.open_nursery() as nursery:

            async def until_closed() -> None:
                await closed.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_closed)
            try:
                await attack(host)
                with trio.move_on_after(patience):
                    await closed.wait()
            except Exception:  # noqa: BLE001 - cut off, in one of libp2p's many ways
                with trio.move_on_after(patience):
                    await closed.wait()
            nursery.cancel_scope.cancel()
        return closed.is_set()


async def connections_one_after_another(address: str, count: int) -> None:
    """Connect with a new identity and leave, this many times."""
    remaining = iter(range(count))

    async def come_and_go() -> None:
        for _ in remaining:
            async with intruder(address):
                pass

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(come_and_go)


async def propose(address: str, protocol: bytes) -> bytes:
    """Propose this way of being secure; what is answered."""
    answer = b""
    async with await trio.open_tcp_stream(*host_and_port(address)) as stream:
        await stream.send_all(MULTISTREAM + bytes([len(protocol) + 1]) + protocol + b"\n")
        with trio.move_on_after(2):
            while not answer.endswith(b"na\n") and (data := await stream.receive_some(65536)):
                answer += data
    return answer


async def reconnects(address: str, count: int) -> int:
    """Connect and leave again and again, always as the same peer; how often that worked."""
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    host = libp2p_host.make_host(
        os.urandom(32), MeshConfig(listen=()), gate=lambda _peer: True, fault=lambda *_: None
    )
    location, _, peer = address.rpartition("/p2p/")
    worked = 0
    async with host.run([]):
        for _ in range(count):
            try:
                libp2p_host.forget_failure(host, peer)
                await libp2p_host.dial(host, location, peer)
                (connection,) = host.get_network().get_connections()
                await connection.muxed_conn.open_stream()
                with trio.move_on_after(0.02):
                    await connection.muxed_conn.event_closed.wait()
                    continue
                worked += 1
                await libp2p_host.kill_connection(connection)
            except Exception:  # noqa: BLE001 - refused, in one of libp2p's many ways
                pass
    return worked


async def _stream(host: Any, protocol: str) -> Any:
    return await libp2p_host.open_stream(host, libp2p_host.peer_of(host.victim), protocol)


async def say_raw(host: Any, frames: bytes) -> None:
    """Put these bytes on the wire as Yamux, past all of its rules; waits for the socket."""
    muxed = host.victim.muxed_conn
    while muxed._draining and not muxed.is_closed:
        await muxed._drained.wait()
    muxed._core._next = (1 << 30) + 1  # whatever the victim answers, it is to a stream that was
    muxed._core.say(frames)
    muxed.flush()
    await trio.lowlevel.checkpoint()
    if muxed.is_closed:
        raise trio.BrokenResourceError


async def gigabyte_length_prefix(address: str, protocol: str) -> bool:
    async def attack(host: Any) -> None:
        stream = await _stream(host, protocol)
        await stream.write(b"\x80\x80\x80\x80\x04" + b"x" * 1000)

    return await as_intruder(address, attack)


async def garbage_frames(address: str, protocol: str) -> bool:
    async def attack(host: Any) -> None:
        stream = await _stream(host, protocol)
        await stream.write(b"\x05\x07junk")

    return await as_intruder(address, attack)


async def five_thousand_streams(address: str) -> bool:
    """Bare Yamux SYNs: as many streams, none of which ever says what it is for."""

    async def attack(host: Any) -> None:
        for number in range(5000):
            syn = b"\x00\x01\x00\x01" + (2 * number + 1001).to_bytes(4, "big") + bytes(4)
            await say_raw(host, syn)

    return await as_intruder(address, attack)


async def never_read(address: str, protocol: str, frame: bytes) -> bool:
    """Ask an echoing protocol for ever, and read nothing of what it says."""

    async def attack(host: Any) -> None:
        stream = await _stream(host, protocol)
        with trio.move_on_after(20):
            while True:
                await stream.write(frame)

    return await as_intruder(address, attack)


async def ignore_flow_control(address: str, protocol: str, megabytes: int) -> bool:
    """Push frames into an echoing stream, without reading and without regard to its window."""

    async def attack(host: Any) -> None:
        stream = await _stream(host, protocol)
        frame = prefixed(b"\x00" + os.urandom(63 * 1024))
        number = stream.muxed_stream.stream_id
        header = bytes(4) + number.to_bytes(4, "big") + len(frame).to_bytes(4, "big")
        for _ in range(megabytes * 16):
            await say_raw(host, header + frame)

    return await as_intruder(address, attack)


def prefixed(body: bytes) -> bytes:
    """With its length before it, as a uvarint."""
    length = len(body)
    encoded = bytearray()
    while length >= 0x80:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes(encoded) + bytes([length]) + body


async def garbage_gossip(address: str) -> bool:
    """RPCs that are no protobuf."""
    dice = random.Random(13)

    async def attack(host: Any) -> None:
        for size in (1, 50, 5000):
            stream = await _stream(host, str(GOSSIP_PROTOCOL))
            await stream.write(prefixed(b"\xff" + dice.randbytes(size)))

    return await as_intruder(address, attack)


async def garbage_gossip_messages(address: str) -> bool:
    """Well-formed RPCs whose messages have fields that are no keys, no peers and no signatures."""
    dice = random.Random(13)
    common = {"data": b"x", "topicIDs": ["/pinaivu/test/1"], "signature": b"s" * 64}
    hostile = [
        rpc_pb2.Message(from_id=b"\x00", key=b"\xff" * 40, seqno=b"1", **common),
        rpc_pb2.Message(from_id=b"\x12\x20" + b"k" * 32, key=dice.randbytes(36), **common),
        rpc_pb2.Message(data=b"x", topicIDs=["/pinaivu/test/1"]),
    ]
    long_topic = rpc_pb2.RPC.SubOpts(subscribe=True, topicid="t" * 5000)
    rpc = rpc_pb2.RPC(publish=hostile, subscriptions=[long_topic] * 2000)

    async def attack(host: Any) -> None:
        stream = await _stream(host, str(GOSSIP_PROTOCOL))
        await stream.write(prefixed(rpc_pb2.RPC(publish=hostile).SerializeToString()))
        await stream.write(prefixed(rpc.SerializeToString()))

    return await as_intruder(address, attack)


async def oversized_gossip(address: str) -> bool:
    """An RPC whose length says a gibibyte."""

    async def attack(host: Any) -> None:
        stream = await _stream(host, str(GOSSIP_PROTOCOL))
        await stream.write(b"\x80\x80\x80\x80\x04" + bytes(1000))

    return await as_intruder(address, attack, patience=0.5)


async def garbage_to_stock_protocols(address: str) -> bool:
    """Random bytes to whatever libp2p itself serves."""
    dice = random.Random(17)

    async def attack(host: Any) -> None:
        for protocol in ("/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"):
            stream = await _stream(host, protocol)
            await stream.write(dice.randbytes(3000))

    return await as_intruder(address, attack, patience=0.5)


async def garbage_yamux(address: str) -> bool:
    """Frames of no known type, version or stream, behind a proper handshake."""
    dice = random.Random(19)

    async def attack(host: Any) -> None:
        await say_raw(host, dice.randbytes(12_000))

    return await as_intruder(address, attack)
