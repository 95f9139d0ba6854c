"""Who may be connected, who is cut off, who is banned, and who goes when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable
from typing import Any, Final

import trio

from pinaivu_node.mesh.conduct import Conduct, Offence
from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.counters import Counters
from pinaivu_node.mesh.libp2p.connections import Connections
from pinaivu_node.mesh.libp2p.stream import Libp2pFrameStream
from pinaivu_node.mesh.peers import PeerBook
from pinaivu_node.mesh.presence import Presence
from pinaivu_node.protocol.ids import Milliseconds, PeerId

logger = logging.getLogger(__name__)

_LOOKS_PER_STALL: Final = 8
"""So often is a stream looked at within the stall limit: a stall is noticed an eighth late."""


class Discipline:
    """Of one mesh; what it decides it does through `kill`, which closes a connection at once."""

    def __init__(
        self,
        config: MeshConfig,
        connections: Connections,
        presence: Presence,
        counters: Counters,
        *,
        kill: Callable[[Any], None],
    ) -> None:
        self.book = PeerBook(
            max_held=config.max_held_per_peer, gossip_per_second=config.max_gossip_per_second
        )
        self._max_connections = config.max_connections
        self._connections = connections
        self._presence = presence
        self._counters = counters
        self._kill = kill
        self._conduct = Conduct()

    def weight(self, peer: PeerId) -> float:
        """What the offences of this peer weigh now."""
        return self._conduct.weight(peer, now=trio.current_time())

    def admits(self, peer: PeerId) -> bool:
        """Whether no ban stands."""
        return not self.book.is_banned(peer, now=trio.current_time())

    def admits_gossip(self, peer: PeerId) -> bool:
        """Whether this peer may forward one message more now."""
        if self.book.admits_gossip(peer, now=trio.current_time()):
            return True
        self._counters.gossip_dropped += 1
        self._note(peer, Offence.GOSSIP_FLOOD)
        return False

    def connected(self, peer: PeerId, *, in_use: Callable[[], Container[PeerId]]) -> None:
        """It made a connection, which is up; `in_use` are those we have something to do with."""
        if not self._conduct.admits_connection(peer, now=trio.current_time()):
            self._note(peer, Offence.RECONNECTING)
        if len(self._connections) > self._max_connections:
            least = self._connections.least_wanted(in_use=in_use(), weight=self.weight)
            if least is not None:
                self._counters.peers_evicted += 1
                self._kill(least)

    async def drop_stalled(self, streams: Iterable[Libp2pFrameStream], *, limit: float) -> None:
        """Cut off, until cancelled, who takes nothing of what we have for it."""
        while True:
            await trio.sleep(limit / _LOOKS_PER_STALL)
            now = trio.current_time()
            for stream in list(streams):
                if stream.is_stalled(now=now, limit=limit):
                    self.hang_up(stream.peer, f"it read nothing for {limit:g} s", Offence.STALLING)

    def hang_up(self, peer: PeerId, reason: str, offence: Offence = Offence.PROTOCOL) -> None:
        """Cut off a peer that misbehaved, and say so once; ban it if it does so all the time."""
        self._note(peer, offence)
        if self.book.is_first_complaint(peer):
            logger.warning("dropped %s: %s", peer, reason)
        self._counters.peers_dropped += peer in self._presence
        self.cut_off(peer)

    def ban(self, peer: PeerId, *, duration: Milliseconds) -> None:
        """See `Mesh.ban`."""
        self._counters.bans += 1
        self.book.ban(peer, until=trio.current_time() + duration / 1000)
        self.cut_off(peer)

    def cut_off(self, peer: PeerId) -> None:
        """Close all connections to this peer at once."""
        for connection in self._connections.of(peer):
            self._kill(connection)

    def _note(self, peer: PeerId, offence: Offence) -> None:
        self._counters.offences[offence] += 1
        seconds = self._conduct.offend(peer, offence, now=trio.current_time())
        if seconds is not None:
            logger.warning("banned %s for %d s: %s, again and again", peer, seconds, offence)
            self.ban(peer, duration=Milliseconds(round(1000 * seconds)))
