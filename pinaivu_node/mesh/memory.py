"""The same network in one process, under whatever clock trio has: virtual in tests.

A `MemoryNetwork` holds the wires; each `join` is one peer.  What a real network does to peers it
does too, seeded and repeatable: latency, lost gossip, partitions, crashes (SIGKILL), hangs
(SIGSTOP).  It costs no task per peer and none per message: one clockwork delivers everything.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Final, Self

import trio

from pinaivu_node.mesh.address import split_address
from pinaivu_node.mesh.backoff import Backoff
from pinaivu_node.mesh.clockwork import Clockwork, Latency, reachable_from
from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.counters import Counters
from pinaivu_node.mesh.framing import check_frame_size
from pinaivu_node.mesh.inbox import Inbox
from pinaivu_node.mesh.memory_stream import MemoryStream, Wire
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
from pinaivu_node.mesh.peers import PeerBook
from pinaivu_node.mesh.presence import Presence
from pinaivu_node.mesh.redial import Redialer
from pinaivu_node.mesh.serving import Serving
from pinaivu_node.protocol.ids import Milliseconds, PeerId, Topic
from pinaivu_node.protocol.signing import Signer

DEAD_AFTER: Final = 4.0
"""Seconds until a peer that went silent is given up, as pings do on the real mesh."""


class MemoryNetwork:
    """The wires between the peers of one process.  An async context manager."""

    def __init__(
        self, *, seed: int = 0, latency: float | Latency = 0.0, gossip_loss: float = 0.0
    ) -> None:
        self._random = random.Random(seed)  # noqa: S311 - to be repeatable, not to be secret
        self._latency: Latency = latency if callable(latency) else lambda _a, _b: latency
        self._gossip_loss = gossip_loss
        self._meshes: dict[PeerId, MemoryMesh] = {}
        self._wires: dict[frozenset[PeerId], Wire] = {}
        self._groups: dict[PeerId, int] = {}
        self._hung: set[PeerId] = set()
        self._reach: dict[PeerId, tuple[PeerId, ...]] = {}
        self._clockwork = Clockwork()
        self._nursery_manager: AbstractAsyncContextManager[trio.Nursery] | None = None
        self._nursery: trio.Nursery

    async def __aenter__(self) -> Self:
        self._nursery_manager = trio.open_nursery()
        self._nursery = await self._nursery_manager.__aenter__()
        self._nursery.start_soon(self._clockwork.run)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._nursery_manager is not None  # noqa: S101 - entered before it is left
        self._nursery.cancel_scope.cancel()
        await self._nursery_manager.__aexit__(None, None, None)

    @asynccontextmanager
    async def join(self, seed: bytes, config: MeshConfig | None = None) -> AsyncIterator[Mesh]:
        """A mesh with the identity of this seed, closed on leaving.

        `crash` cancels the block: it then ends without an exception, as a killed process would.
        """
        peer = Signer(seed).peer_id
        if peer in self._meshes:
            raise MeshError(f"{peer} is in the network already")
        failure: BaseException | None = None
        async with trio.open_nursery() as nursery:
            mesh = self._meshes[peer] = MemoryMesh(self, peer, nursery, config or MeshConfig())
            self._reach.clear()
            try:
                yield mesh
            except BaseException as exc:
                if nursery.cancel_scope.cancel_called:  # `crash`
                    raise
                failure = exc  # raised again outside the nursery, which would wrap it
            finally:
                mesh.leave()
                if self._meshes.get(peer) is mesh:
                    del self._meshes[peer]
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    # --- what happens to networks -----------------------------------------------------------------

    def partition(self, *groups: Iterable[PeerId]) -> None:
        """Let only peers of the same group reach each other; those unnamed are a group too."""
        self._groups = {
            peer: number for number, group in enumerate(groups, start=1) for peer in group
        }
        self._rewire()

    def heal(self) -> None:
        """Undo `partition`.  What was in flight for less than DEAD_AFTER arrives now."""
        self._groups = {}
        self._rewire()

    def crash(self, peer: PeerId) -> None:
        """Kill this peer in mid-step: no END, no goodbye; the others notice the lost connection."""
        mesh = self._meshes.pop(peer, None)
        self._hung.discard(peer)
        if mesh is not None:
            mesh.leave()
            mesh.nursery.cancel_scope.cancel()

    def hang(self, peer: PeerId) -> None:
        """Silence this peer: its process stands still as far as others can see."""
        self._hung.add(peer)
        self._rewire()

    def resume(self, peer: PeerId) -> None:
        """Undo `hang`."""
        self._hung.discard(peer)
        self._rewire()

    def _rewire(self) -> None:
        self._reach.clear()
        for ends, wire in list(self._wires.items()):
            one, other = ends
            if self.can_reach(one, other):
                wire.mend()
            elif wire.is_whole:
                wire.cut()
                self.after(DEAD_AFTER, self._give_up, wire, wire.cuts)

    def _give_up(self, wire: Wire, cuts: int) -> None:
        if not wire.is_whole and wire.cuts == cuts:
            self.disconnect(*wire.ends)

    # --- what meshes ask of it --------------------------------------------------------------------

    def can_reach(self, one: PeerId, other: PeerId) -> bool:
        """Whether bytes pass between these two now."""
        return self._groups.get(one, 0) == self._groups.get(other, 0) and not (
            {one, other} & self._hung
        )

    def after(self, delay: float, action: Callable[..., None], *arguments: object) -> None:
        """Run `action` when that many seconds have passed."""
        self._clockwork.add(delay, action, arguments)

    def latency(self, one: PeerId, other: PeerId) -> float:
        """Seconds from one to the other."""
        return self._latency(one, other)

    def dice(self) -> float:
        """The one source of randomness."""
        return self._random.random()

    def connect(self, dialler: PeerId, place: PeerId, expected: PeerId) -> None:
        """Connect to whoever is at `place`; PeerUnreachable if that is not `expected`."""
        mesh, other = self._meshes.get(dialler), self._meshes.get(place)
        if mesh is None or other is None or not self.can_reach(dialler, place):
            raise PeerUnreachable(f"nobody answers at /memory/{place}")
        if place != expected:
            raise PeerUnreachable(f"{place} is there, not {expected}")
        if not (mesh.admits(place) and other.admits(dialler)):
            raise PeerUnreachable(f"{place} refuses the connection")
        if frozenset((dialler, place)) not in self._wires:
            self._wires[frozenset((dialler, place))] = Wire(
                (dialler, place), self.after, self.latency
            )
            self._reach.clear()
            mesh.presence.connect(place)
            other.presence.connect(dialler)

    def disconnect(self, one: PeerId, other: PeerId) -> None:
        """End the connection between these two, if there is one."""
        wire = self._wires.pop(frozenset((one, other)), None)
        if wire is None:
            return
        self._reach.clear()
        wire.end()
        for peer, lost in ((one, other), (other, one)):
            if (mesh := self._meshes.get(peer)) is not None:
                mesh.presence.disconnect(lost)

    def disconnect_all(self, peer: PeerId) -> None:
        """End every connection of this peer."""
        for ends in [ends for ends in self._wires if peer in ends]:
            self.disconnect(*ends)

    def wire(self, one: PeerId, other: PeerId) -> Wire | None:
        """The connection between these two."""
        return self._wires.get(frozenset((one, other)))

    def mesh(self, peer: PeerId) -> MemoryMesh | None:
        """The peer itself, if it is in the network."""
        return self._meshes.get(peer)

    def gossip(self, publisher: PeerId, topic: Topic, payload: bytes) -> None:
        """Carry a message to every subscriber that a chain of connections leads to."""
        if publisher not in self._reach:
            edges = [wire.ends for wire in self._wires.values() if wire.is_whole]
            reached = reachable_from(publisher, edges)
            self._reach.update(dict.fromkeys(reached, reached))
        delivery = Delivery(publisher, payload)
        for peer in self._reach[publisher]:
            mesh = self._meshes[peer]
            if peer == publisher or topic not in mesh.inboxes:
                continue
            if not self._gossip_loss or self._random.random() >= self._gossip_loss:
                self.after(self.latency(publisher, peer), mesh.deliver, topic, delivery)


class MemoryMesh:
    """See `Mesh`.  Made by `MemoryNetwork.join`."""

    def __init__(
        self, network: MemoryNetwork, peer: PeerId, nursery: trio.Nursery, config: MeshConfig
    ) -> None:
        self.nursery = nursery
        self.presence = Presence()
        self.inboxes: dict[Topic, list[Inbox]] = {}
        self._network = network
        self._peer_id = peer
        self._config = config
        self._book = PeerBook(
            max_held=config.max_held_per_peer, gossip_per_second=config.max_gossip_per_second
        )
        self._counters, self._serving = Counters(), Serving(config.max_streams_per_peer)
        self._handlers: dict[str, StreamHandler] = {}
        self._closed = False
        self._redialer = Redialer(
            nursery, self.presence, self.dial, random=network.dice, backoff=Backoff()
        )

    @property
    def peer_id(self) -> PeerId:
        """See `Mesh.peer_id`."""
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """See `Mesh.addresses`."""
        return (f"/memory/{self._peer_id}/p2p/{self._peer_id}",)

    async def publish(self, topic: Topic, payload: bytes) -> None:
        """See `Mesh.publish`."""
        check_frame_size(payload)
        await trio.lowlevel.checkpoint()
        self._counters.gossip_published += 1
        if not self._closed:
            self._network.gossip(self._peer_id, topic, payload)

    @asynccontextmanager
    async def subscribe(self, topic: Topic) -> AsyncIterator[AsyncIterator[Delivery]]:
        """See `Mesh.subscribe`."""
        await trio.lowlevel.checkpoint()
        inbox = Inbox()
        self.inboxes.setdefault(topic, []).append(inbox)
        try:
            yield inbox
        finally:
            self.inboxes[topic].remove(inbox)
            if not self.inboxes[topic]:
                del self.inboxes[topic]

    def deliver(self, topic: Topic, delivery: Delivery) -> None:
        """Take a gossip message in."""
        if topic not in self.inboxes or not self.admits(delivery.publisher):
            return
        self._counters.gossip_received += 1
        for inbox in self.inboxes[topic]:
            self._counters.gossip_dropped += inbox.deliver(delivery)

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """See `Mesh.handle`."""
        self._handlers[protocol] = handler

    async def open(self, peer: PeerId, protocol: str) -> FrameStream:
        """See `Mesh.open`."""
        await trio.lowlevel.checkpoint()
        if peer in self._redialer and peer not in self.presence:
            with trio.move_on_after(self._config.open_timeout):
                await self.presence.wait_connected(peer)
        await self._round_trip(peer)
        wire, other = self._network.wire(self._peer_id, peer), self._network.mesh(peer)
        if wire is None or other is None:
            raise PeerUnreachable(f"{peer} is not connected")
        if not wire.is_whole:
            await trio.sleep(self._config.open_timeout)
            raise PeerUnreachable(f"{peer} did not open {protocol} in time")
        return other.accept(self, protocol, wire)

    def accept(self, opener: MemoryMesh, protocol: str, wire: Wire) -> MemoryStream:
        """Serve a stream that `opener` opens; return its end of it."""
        handler = self._handlers.get(protocol)
        if handler is None:
            raise PeerUnreachable(f"{self._peer_id} does not speak {protocol}")
        if wire.streams >= self._config.max_streams_per_peer:
            self.hang_up(opener.peer_id, "it opened too many streams at once")
            raise PeerUnreachable(f"{self._peer_id} hung up")
        theirs, ours = wire.open_stream(
            opener.peer_id, self._peer_id, opener._counters, self._counters
        )
        theirs.attend(opener._config.stall_limit, opener.hang_up)
        ours.attend(self._config.stall_limit, self.hang_up)
        self.nursery.start_soon(self._serving.serve, handler, ours, self)
        return theirs

    async def dial(self, address: str) -> PeerId:
        """See `Mesh.dial`."""
        location, peer = split_address(address)
        await trio.lowlevel.checkpoint()
        if not self.admits(peer):
            raise PeerUnreachable(f"{peer} is banned, or we are closing")
        if peer in self.presence:
            return peer
        place = PeerId(location.removeprefix("/memory/"))
        await self._round_trip(place)
        self._network.connect(self._peer_id, place, peer)
        return peer

    async def _round_trip(self, peer: PeerId) -> None:
        """What a handshake costs at least."""
        delay = self._network.latency(self._peer_id, peer)
        await trio.sleep(delay + self._network.latency(peer, self._peer_id))

    def keep(self, address: str) -> None:
        """See `Mesh.keep`."""
        self._redialer.keep(address)

    def forget(self, peer: PeerId) -> None:
        """See `Mesh.forget`."""
        self._redialer.forget(peer)

    def peers(self) -> frozenset[PeerId]:
        """See `Mesh.peers`."""
        return self.presence.peers()

    def watch_peers(self) -> AbstractAsyncContextManager[AsyncIterator[PeerEvent]]:
        """See `Mesh.watch_peers`."""
        return self.presence.watch()

    async def disconnect(self, peer: PeerId) -> None:
        """See `Mesh.disconnect`."""
        await trio.lowlevel.checkpoint()
        self._network.disconnect(self._peer_id, peer)

    def ban(self, peer: PeerId, *, duration: Milliseconds) -> None:
        """See `Mesh.ban`."""
        self._book.ban(peer, until=trio.current_time() + duration / 1000)
        self._network.disconnect(self._peer_id, peer)

    def hang_up(self, peer: PeerId, _reason: str) -> None:
        """Cut off a peer that misbehaved."""
        self._counters.peers_dropped += peer in self.presence
        self._network.disconnect(self._peer_id, peer)

    def admits(self, peer: PeerId) -> bool:
        """Whether we want to hear of this peer."""
        return not self._closed and not self._book.is_banned(peer, now=trio.current_time())

    def statistics(self) -> MeshStatistics:
        """See `Mesh.statistics`."""
        return self._counters.statistics(
            connected_peers=len(self.presence), redials=self._redialer.redials
        )

    def leave(self) -> None:
        """End everything without waiting for anything."""
        self._closed = True
        self._redialer.forget_all()
        self._network.disconnect_all(self._peer_id)

    def links(self) -> tuple[Link, ...]:
        """See `Mesh.links`."""
        return self.presence.links()

    async def close(self) -> None:
        """See `Mesh.close`."""
        await trio.lowlevel.checkpoint()
        self.leave()
