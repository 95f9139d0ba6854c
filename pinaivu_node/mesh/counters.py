"""The counters behind `MeshStatistics`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pinaivu_node.mesh.conduct import Offence
from pinaivu_node.mesh.mesh import MeshStatistics


@dataclass(slots=True)
class Counters:
    """Owned by one mesh, counted up by its streams and inboxes."""

    open_streams: int = 0
    frames_sent: int = 0
    frames_received: int = 0
    gossip_published: int = 0
    gossip_received: int = 0
    gossip_dropped: int = 0
    peers_dropped: int = 0
    offences: Counter[Offence] = field(default_factory=Counter)
    bans: int = 0
    peers_refused: int = 0
    peers_evicted: int = 0
    handshakes_failed: int = 0

    def handshake_failed(self) -> None:
        """Count a connection that never got so far as to say who it is."""
        self.handshakes_failed += 1

    def statistics(self, *, connected_peers: int, redials: int) -> MeshStatistics:
        """A frozen copy, with what others count."""
        return MeshStatistics(
            connected_peers=connected_peers,
            open_streams=self.open_streams,
            frames_sent=self.frames_sent,
            frames_received=self.frames_received,
            gossip_published=self.gossip_published,
            gossip_received=self.gossip_received,
            gossip_dropped=self.gossip_dropped,
            peers_dropped=self.peers_dropped,
            redials=redials,
            protocol_offences=self.offences[Offence.PROTOCOL],
            stream_flood_offences=self.offences[Offence.STREAM_FLOOD],
            hoarding_offences=self.offences[Offence.HOARDING],
            gossip_flood_offences=self.offences[Offence.GOSSIP_FLOOD],
            reconnecting_offences=self.offences[Offence.RECONNECTING],
            stalling_offences=self.offences[Offence.STALLING],
            bans=self.bans,
            peers_refused=self.peers_refused,
            peers_evicted=self.peers_evicted,
            handshakes_failed=self.handshakes_failed,
        )
