"""The counters behind `MeshStatistics`."""

from __future__ import annotations

from dataclasses import dataclass

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
        )
