"""The Mesh interface: what every peer may ask of the network, whatever carries it.

Two implementations pass one contract suite (`tests/mesh/test_contract.py`): `libp2p.py`, real
sockets, and `memory.py`, the same network in one process under a virtual clock.

What may be relied on:

* Gossip is best effort: a message may be lost, repeated or late, never altered on the way by
  anyone but its publisher.  Every message carries its own deadline and signature.
* A framed stream delivers frames whole and in order, or says that it did not: it ends with
  `StreamEnded` after the peer's explicit END frame and with `StreamLost` in every other way.
* A peer's identity is proven by the transport before a byte of its arrives.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from pinaivu_node.protocol.ids import Milliseconds, PeerId, Topic

MAX_FRAME_BYTES: Final = 1 << 20
"""The longest frame and the longest gossip payload; a longer length prefix ends the connection."""


class MeshError(Exception):
    """The network could not do what was asked.  Nothing here is the caller's bug."""


class PeerUnreachable(MeshError):
    """The peer could not be dialled, or refused, or did not answer in time."""


class StreamLost(MeshError):
    """The stream broke: reset, connection lost, or end of bytes without an END frame."""


class StreamEnded(MeshError):
    """The peer said END: everything it sent has been received."""


class FrameStream(Protocol):
    """A long-lived stream of frames to one peer.

    One task may receive while any number send; frames of concurrent senders never interleave.
    Every wait may be cancelled without harm to the stream or to the connection beneath it.
    """

    @property
    def peer(self) -> PeerId:
        """Who is at the other end, as proven by the transport."""
        ...

    async def send(self, frame: bytes) -> None:
        """Queue one frame of at most MAX_FRAME_BYTES; wait while the bounded queue is full.

        Returning does not mean that the peer has it.  Raises StreamLost if the stream broke or
        was closed, and drops a peer that has read nothing for the stall limit.
        """
        ...

    async def receive(self) -> bytes:
        """The next frame; raises StreamEnded or StreamLost when there is none to come."""
        ...

    async def end(self) -> None:
        """Say END after what was queued, and stop sending.  Receiving goes on."""
        ...

    def reset(self) -> None:
        """Abandon the stream at once, in both directions.  Harmless when repeated."""
        ...


@dataclass(frozen=True, slots=True)
class Delivery:
    """One gossip message as it arrived: `publisher` is proven by the gossip signature."""

    publisher: PeerId
    payload: bytes


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A first connection to this peer is up."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The last connection to this peer is gone."""

    peer: PeerId


PeerEvent = PeerConnected | PeerLost


class Path(StrEnum):
    """What carries a connection."""

    DIRECT = "direct"
    WEBSOCKET = "websocket"
    RELAYED = "relayed"


@dataclass(frozen=True, slots=True)
class Link:
    """One connection, as it is now."""

    peer: PeerId
    path: Path
    remote: str
    """Host and port of what we are connected to, which may be a proxy; or the relay."""
    dialled: bool
    """Whether it was we who dialled."""
    round_trip_ms: float | None
    """Smoothed; None until measured."""
    streams: int = 0
    """Open ones, those of libp2p's own protocols included."""
    bytes_sent: int = 0
    bytes_received: int = 0
    """On the wire, encrypted."""
    queued_bytes: int = 0
    """That wait to be sent: a peer that reads slowly."""
    unread_bytes: int = 0
    """That arrived and were not read: we are slow."""
    offences: float = 0.0
    """What the peer did wrong, as it weighs now; at 100 it is banned."""


StreamHandler = Callable[[FrameStream], Awaitable[None]]
"""Serves one inbound stream; when it returns or raises the stream is reset, never the process."""


@dataclass(frozen=True, slots=True)
class MeshStatistics:
    """What the mesh did since it started; counters only grow."""

    connected_peers: int
    open_streams: int
    frames_sent: int
    frames_received: int
    gossip_published: int
    gossip_received: int
    gossip_dropped: int
    peers_dropped: int
    redials: int
    protocol_offences: int = 0
    stream_flood_offences: int = 0
    hoarding_offences: int = 0
    gossip_flood_offences: int = 0
    reconnecting_offences: int = 0
    stalling_offences: int = 0
    bans: int = 0
    peers_refused: int = 0
    """Connections of peers that are banned."""
    peers_evicted: int = 0
    """Idle ones that had to make room."""
    handshakes_failed: int = 0
    pipes: int = 0
    """That pass through us now, as a relay."""
    pipes_made: int = 0
    pipes_refused: int = 0
    pipe_bytes: int = 0


class Mesh(Protocol):
    """This peer's place in the network."""

    @property
    def peer_id(self) -> PeerId:
        """Our own name."""
        ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs under which we can be dialled, each ending in /p2p/<our peer id>."""
        ...

    async def publish(self, topic: Topic, payload: bytes) -> None:
        """Gossip `payload` to whoever subscribes to `topic`.  Best effort; never waits for it."""
        ...

    def subscribe(self, topic: Topic) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Receive what is published on `topic` by others while the context is open.

        The inbox is bounded: when its reader is slow the oldest message is dropped and counted.
        """
        ...

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of `protocol` with `handler`, each in its own task.

        An exception from a handler is logged once and resets that stream.  A RemoteProtocolError
        is also acted on: its `action` disconnects or bans the peer.
        """
        ...

    async def open(self, peer: PeerId, protocol: str) -> FrameStream:
        """Open a stream to a peer that is connected or kept; raises PeerUnreachable.

        It costs milliseconds: keep the stream.  Closing is the caller's (`end` or `reset`).
        """
        ...

    async def dial(self, address: str) -> PeerId:
        """Connect to a multiaddr that ends in /p2p/<peer id>; raises PeerUnreachable.

        Returns at once when that peer is already connected.
        """
        ...

    def keep(self, address: str) -> None:
        """Stay connected to this multiaddr: dial now, and redial with backoff and jitter."""
        ...

    def forget(self, peer: PeerId) -> None:
        """Undo `keep` for this peer.  A live connection stays."""
        ...

    def peers(self) -> frozenset[PeerId]:
        """Who is connected now."""
        ...

    def links(self) -> tuple[Link, ...]:
        """Every connection that there is now."""
        ...

    def watch_peers(self) -> AbstractAsyncContextManager[AsyncIterator[PeerEvent]]:
        """Receive connections made and lost while the context is open, present peers first."""
        ...

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to this peer.  If it is kept, it is redialled."""
        ...

    def ban(self, peer: PeerId, *, duration: Milliseconds) -> None:
        """Drop this peer and refuse it, inbound and outbound, for a while."""
        ...

    def statistics(self) -> MeshStatistics:
        """Counters for the metrics page."""
        ...

    async def close(self) -> None:
        """Tell every peer that we leave, and release the port.  Harmless when repeated."""
        ...
