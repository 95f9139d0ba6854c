"""The only security and the only muxer of our hosts: Noise and Yamux, our own after the handshake.

See the package for what is changed and why.
"""

from __future__ import annotations

from typing import Any

from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p.muxer import Fault, MuxedConnection
from pinaivu_node.mesh.libp2p.pulse import Pulse
from pinaivu_node.mesh.libp2p.secure import GatedNoise, PeerGate
from pinaivu_node.mesh.yamux.connection import Limits

# A peer over its streams is hung up on by the mesh, which counts over all its connections; this
# bounds what one connection holds until then.
_STREAMS_BEFORE_REFUSAL = 2


class Muxer(MuxerMultistream):  # type: ignore[misc] # untyped base
    """Negotiates Yamux and makes ours; the stock one ignores the class it was given."""

    limits: Limits
    pulse: Pulse
    fault: Fault

    async def new_conn(self, conn: Any, peer_id: Any) -> Any:
        """Agree on Yamux over a secured connection, and take the connection over."""
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        muxed = MuxedConnection(
            conn, peer_id, limits=self.limits, pulse=self.pulse, fault=self.fault
        )
        return self._annotate_connection(muxed, conn, protocol)


def transport_options(
    key_pair: Any, config: MeshConfig, *, gate: PeerGate, fault: Fault
) -> tuple[Any, Muxer]:
    """What a host is to secure its connections with, and to share them between streams."""
    noise = GatedNoise(key_pair, noise_privkey=create_new_key_pair().private_key)
    noise.gate = gate
    muxer = Muxer({YAMUX: MuxedConnection}, negotiate_timeout=int(config.dial_timeout))
    muxer.limits = Limits(
        inbound_streams=_STREAMS_BEFORE_REFUSAL * config.max_streams_per_peer,
        window_budget=config.max_held_per_peer,
    )
    muxer.pulse = Pulse(ping_interval=config.ping_interval, dead_after=config.dead_after)
    muxer.fault = fault
    return {NOISE: noise}, muxer
