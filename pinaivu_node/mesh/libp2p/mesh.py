"""The Mesh on py-libp2p: TCP or WebSocket, Noise, Yamux, gossipsub."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import trio

from pinaivu_node.mesh.address import is_circuit, split_address
from pinaivu_node.mesh.backoff import Backoff
from pinaivu_node.mesh.conduct import Offence
from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.counters import Counters
from pinaivu_node.mesh.framing import check_frame_size
from pinaivu_node.mesh.inbox import Inbox
from pinaivu_node.mesh.libp2p import gossip
from pinaivu_node.mesh.libp2p import host as libp2p_host
from pinaivu_node.mesh.libp2p.circuit import Circuits
from pinaivu_node.mesh.libp2p.connections import Connections, close_politely
from pinaivu_node.mesh.libp2p.discipline import Discipline
from pinaivu_node.mesh.libp2p.listening import Notifee, check_listenable
from pinaivu_node.mesh.libp2p.stream import Libp2pFrameStream
from pinaivu_node.mesh.mesh import (
    Delivery,
    FrameStream,
    Link,
    Mesh,
    MeshError,
    MeshStatistics,
    PeerEvent,
    PeerUnreachable,
    StreamHandler,
)
from pinaivu_node.mesh.presence import Presence
from pinaivu_node.mesh.promise import Promise
from pinaivu_node.mesh.redial import Redialer
from pinaivu_node.mesh.serving import Serving
from pinaivu_node.protocol.ids import Milliseconds, PeerId, Topic
from pinaivu_node.protocol.topics import RELAY

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_libp2p_mesh(config: MeshConfig, *, seed: bytes) -> AsyncIterator[Mesh]:
    """A running mesh with the identity of this 32-byte Ed25519 seed, listening when it is yielded.

    Raises MeshError if an address cannot be listened on, or its certificate not used.  Closes the
    mesh on leaving; what the block raises comes out as it was raised.
    """
    libp2p_host.silence()
    for address in config.listen:
        check_listenable(address, has_certificate=config.tls_certificate is not None)
    mesh = Libp2pMesh(config, seed)
    failure: BaseException | None = None
    async with mesh.running():
        try:
            yield mesh
        except BaseException as exc:  # noqa: BLE001 - raised again below, outside the nurseries
            failure = exc
    if failure is not None:
        raise failure


class Libp2pMesh:
    """See `Mesh`.  Made by `open_libp2p_mesh`."""

    def __init__(self, config: MeshConfig, seed: bytes) -> None:
        self._config = config
        self._counters = Counters()
        self._host = libp2p_host.make_host(
            seed,
            config,
            gate=self._gate,
            fault=self.hang_up,
            failed=self._counters.handshake_failed,
        )
        self._swarm = self._host.get_network()
        self._peer_id = PeerId(str(self._host.get_id()))
        self._pubsub, self._router = gossip.make_pubsub(self._host, config)
        self._pubsub.deliver = self._deliver
        self._pubsub.admits = self._admits_gossip
        self._pubsub.fault = self.hang_up
        self._presence = Presence()
        self._connections = Connections(self._peer_id)
        self._discipline = Discipline(
            config, self._connections, self._presence, self._counters, kill=self._kill
        )
        self._pubsub.restart = self._discipline.cut_off
        self._streams: set[Libp2pFrameStream] = set()
        self._inboxes: dict[Topic, set[Inbox]] = {}
        self._subscribing = trio.Lock()
        self._dials: dict[tuple[PeerId, str], Promise[PeerId]] = {}
        self._serving = Serving(config.max_streams_per_peer)
        self._closed = False
        self._nursery: trio.Nursery
        self._redialer: Redialer
        self._swarm.register_notifee(Notifee(self._on_connected, self._on_disconnected))
        libp2p_host.guard_streams(self._host, self._serve_inbound)
        self._circuits = Circuits(self, self._host, config)
        self.handle(RELAY, self._circuits.serve)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run host, gossip and our own tasks while the block does; close on leaving."""
        async with libp2p_host.run_host(
            self._host, self._pubsub, self._router, self._config.listen
        ):
            if self._config.listen and not self.addresses:
                raise MeshError(f"cannot listen on {', '.join(self._config.listen)}")
            async with trio.open_nursery() as self._nursery:
                self._redialer = Redialer(
                    self._nursery,
                    self._presence,
                    self.dial,
                    random=random.random,
                    backoff=Backoff(),
                    is_detour=self._connections.is_detour,
                )
                for address in self._circuits.kept:
                    self.keep(address)
                stalled = partial(self._discipline.drop_stalled, limit=self._config.stall_limit)
                self._start(stalled, self._streams)
                try:
                    yield
                finally:
                    with trio.CancelScope(shield=True):
                        await self.close()
                    self._nursery.cancel_scope.cancel()

    # --- who we are, and statistics ---------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        """See `Mesh.peer_id`."""
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """See `Mesh.addresses`."""
        return self._circuits.behind([str(address) for address in self._host.get_addrs()])

    def statistics(self) -> MeshStatistics:
        """See `Mesh.statistics`."""
        counted = self._counters.statistics(
            connected_peers=len(self._presence), redials=self._redialer.redials
        )
        return self._circuits.counted_in(counted)

    # --- gossip -----------------------------------------------------------------------------------

    async def publish(self, topic: Topic, payload: bytes) -> None:
        """See `Mesh.publish`."""
        check_frame_size(payload)
        self._counters.gossip_published += 1
        await self._pubsub.publish(topic, payload)

    @asynccontextmanager
    async def subscribe(self, topic: Topic) -> AsyncIterator[AsyncIterator[Delivery]]:
        """See `Mesh.subscribe`."""
        inbox = Inbox()
        async with self._subscribing:
            self._inboxes.setdefault(topic, set()).add(inbox)
            await self._pubsub.subscribe(topic)  # a second time it changes nothing
        try:
            yield inbox
        finally:
            with trio.CancelScope(shield=True):
                async with self._subscribing:
                    self._inboxes[topic].discard(inbox)
                    if not self._inboxes[topic]:
                        del self._inboxes[topic]
                        if not self._closed:
                            await self._pubsub.unsubscribe(topic)

    def _deliver(self, message: Any) -> None:
        publisher = gossip.publisher_of(message)
        if publisher == self._peer_id:
            return
        self._counters.gossip_received += 1
        delivery = Delivery(publisher, bytes(message.data))
        for topic in message.topicIDs:
            for inbox in self._inboxes.get(topic, ()):
                self._counters.gossip_dropped += inbox.deliver(delivery)

    def _admits_gossip(self, peer: PeerId) -> bool:
        return self._admits(peer) and self._discipline.admits_gossip(peer)

    # --- streams ----------------------------------------------------------------------------------

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """See `Mesh.handle`."""

        async def accept(libp2p_stream: Any) -> None:
            stream = self._adopt(libp2p_stream)
            self._nursery.start_soon(self._serving.serve, handler, stream, self)
            await stream.closed.wait()

        self._host.set_stream_handler(protocol, accept)

    async def open(self, peer: PeerId, protocol: str) -> FrameStream:
        """See `Mesh.open`."""
        if peer in self._redialer and peer not in self._presence:
            with trio.move_on_after(self._config.open_timeout):
                await self._presence.wait_connected(peer)
        if peer not in self._presence:
            raise PeerUnreachable(f"{peer} is not connected")
        promise = Promise[Libp2pFrameStream](abandon=Libp2pFrameStream.reset)
        self._start(self._open, peer, protocol, promise)
        return await promise.result()

    async def _open(self, peer: PeerId, protocol: str, promise: Promise[Libp2pFrameStream]) -> None:
        """In a task of its own, so that no caller's cancellation reaches libp2p."""
        try:
            with trio.fail_after(self._config.open_timeout):
                stream = await libp2p_host.open_stream(self._host, peer, protocol)
        except trio.TooSlowError:
            reason = f"it did not open a stream in {self._config.open_timeout:g} s"
            self.hang_up(peer, reason, Offence.STALLING)
            promise.fail(PeerUnreachable(f"{peer} did not open {protocol} in time"))
        except Exception as exc:  # noqa: BLE001 - libp2p raises anything here
            promise.fail(PeerUnreachable(f"{peer} did not open {protocol}: {exc}"))
        else:
            promise.fulfil(self._adopt(stream))

    def _adopt(self, libp2p_stream: Any) -> Libp2pFrameStream:
        stream = Libp2pFrameStream(
            libp2p_stream,
            libp2p_host.peer_of(libp2p_stream),
            counters=self._counters,
            book=self._discipline.book,
            drop=self.hang_up,
        )
        self._streams.add(stream)
        stream.attend(self._on_stream_closed)
        return stream

    def _on_stream_closed(self, stream: Libp2pFrameStream) -> None:
        self._streams.discard(stream)
        self._start(libp2p_host.dismiss, stream.libp2p_stream)

    async def _serve_inbound(
        self, stream: Any, stock_handler: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Every inbound stream of every protocol passes here, and no exception gets out."""
        peer = libp2p_host.peer_of(stream)
        count = self._discipline.book.open_stream(peer)
        try:
            if count > self._config.max_streams_per_peer:
                reason = f"it opened more than {count - 1} streams at once"
                self.hang_up(peer, reason, Offence.STREAM_FLOOD)
            elif self._admits(peer):
                await stock_handler(stream)
                await libp2p_host.part_with(stream, patience=self._config.open_timeout)
        except Exception as exc:  # noqa: BLE001 - the guard; whatever a peer can cause
            if not libp2p_host.is_ordinary_end(exc):
                self.hang_up(peer, f"a stream of it broke our handler: {exc!r}")
        finally:
            self._discipline.book.close_stream(peer)
            await libp2p_host.dismiss(stream)

    # --- peers ------------------------------------------------------------------------------------

    async def dial(self, address: str) -> PeerId:
        """See `Mesh.dial`."""
        location, peer = split_address(address)
        if not self._admits(peer):
            raise PeerUnreachable(f"{peer} is banned, or we are closing")
        if peer in self._presence and (
            is_circuit(location) or not self._connections.is_detour(peer)
        ):
            await trio.lowlevel.checkpoint()
            return peer
        promise = self._dials.get((peer, location))
        if promise is None:
            promise = self._dials[peer, location] = Promise[PeerId]()
            self._start(self._dial, location, peer, promise)
        return await promise.result()

    async def _dial(self, location: str, peer: PeerId, promise: Promise[PeerId]) -> None:
        try:
            libp2p_host.forget_failure(self._host, peer)
            with trio.fail_after(self._config.dial_timeout):
                if is_circuit(location):
                    await self._circuits.dial(location, peer)
                else:
                    await libp2p_host.dial(self._host, location, peer)
        except trio.TooSlowError:
            promise.fail(PeerUnreachable(f"{location} did not answer in time"))
        except Exception as exc:  # noqa: BLE001 - libp2p raises anything here
            promise.fail(PeerUnreachable(f"cannot reach {peer} at {location}: {_innermost(exc)}"))
        else:
            promise.fulfil(peer)
        finally:
            del self._dials[peer, location]

    def keep(self, address: str) -> None:
        """See `Mesh.keep`."""
        self._redialer.keep(address)

    def forget(self, peer: PeerId) -> None:
        """See `Mesh.forget`."""
        self._redialer.forget(peer)

    def peers(self) -> frozenset[PeerId]:
        """See `Mesh.peers`."""
        return self._presence.peers()

    def links(self) -> tuple[Link, ...]:
        """See `Mesh.links`."""
        return self._connections.links(self._discipline.weight)

    def watch_peers(self) -> AbstractAsyncContextManager[AsyncIterator[PeerEvent]]:
        """See `Mesh.watch_peers`."""
        return self._presence.watch()

    async def disconnect(self, peer: PeerId) -> None:
        """See `Mesh.disconnect`."""
        for connection in self._connections.of(peer):
            self._start(close_politely, connection)
        await self._presence.wait_lost(peer)

    def ban(self, peer: PeerId, *, duration: Milliseconds) -> None:
        """See `Mesh.ban`."""
        self._discipline.ban(peer, duration=duration)

    def hang_up(self, peer: PeerId, reason: str, offence: Offence = Offence.PROTOCOL) -> None:
        """Cut off a peer that misbehaved."""
        self._discipline.hang_up(peer, reason, offence)

    def _admits(self, peer: PeerId) -> bool:
        return not self._closed and self._discipline.admits(peer)

    def _gate(self, peer: PeerId) -> bool:
        """Whether a peer that has just proven who it is may connect."""
        admits = self._admits(peer)
        self._counters.peers_refused += not admits
        return admits

    def _kill(self, connection: Any) -> None:
        self._start(libp2p_host.kill_connection, connection)

    def _in_use(self) -> set[PeerId]:
        return {stream.peer for stream in self._streams} | self._redialer.peers()

    def _on_connected(self, connection: Any) -> None:
        self._connections.add(connection)
        peer = libp2p_host.peer_of(connection)
        self._presence.connect(peer)
        if not connection.muxed_conn.is_initiator:
            self._discipline.connected(peer, in_use=self._in_use)
        for surplus in self._connections.surplus(peer):
            self._start(
                partial(
                    self._connections.close_when_quiet,
                    surplus,
                    lambda: self._streams,
                    quiet=self._config.detour_quiet,
                )
            )

    def _on_disconnected(self, connection: Any) -> None:
        if connection in self._connections:  # a connection that was refused was never announced
            peer = libp2p_host.peer_of(connection)
            self._connections.discard(connection)
            self._presence.disconnect(peer)
            if peer not in self._presence:
                self._discipline.book.forget_gossip(peer)

    # --- the end ----------------------------------------------------------------------------------

    async def close(self) -> None:
        """See `Mesh.close`."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        self._redialer.forget_all()
        for stream in list(self._streams):
            stream.reset()
        async with trio.open_nursery() as nursery:
            for connection in self._connections:
                nursery.start_soon(close_politely, connection)
        await self._host.close()

    def _start(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        self._nursery.start_soon(function, *arguments)


def _innermost(exc: BaseException) -> BaseException:
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return exc
