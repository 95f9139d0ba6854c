"""The only security and the only muxer of our hosts: Noise and Yamux, our own after the handshake.

See the package for what is changed and why.
"""

from __future__ import annotations

from typing import Any

from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p.muxer import Fault, MuxedConnection
from pinaivu_node.mesh.libp2p.pressure import Pressure
from pinaivu_node.mesh.libp2p.pulse import Pulse
from pinaivu_node.mesh.libp2p.secure import (
    GatedNoise,
    NoiseOnly,
    PeerGate,
    answer_proposals,
    check_agreed,
    proposal,
)
from pinaivu_node.mesh.yamux.connection import Limits

# A peer over its streams is hung up on by the mesh, which counts over all its connections; this
# bounds what one connection holds until then.
_STREAMS_BEFORE_REFUSAL = 2


class YamuxOnly:
    """In place of the stock choice between muxers: there is one."""

    def __init__(
        self, limits: Limits, pulse: Pulse, pressure: Pressure, fault: Fault, *, timeout: float
    ) -> None:
        self.transports = {YAMUX: MuxedConnection}
        self.pulse = pulse
        self._limits = limits
        self._pressure = pressure
        self._fault = fault
        self._timeout = timeout

    async def new_conn(self, conn: Any, peer_id: Any) -> MuxedConnection:
        """Agree on Yamux over a secured connection, and take the connection over."""
        if conn.is_initiator:
            await conn.write(proposal(YAMUX))
            await check_agreed(conn, YAMUX)
        else:
            await answer_proposals(conn, YAMUX, timeout=self._timeout)
        muxed = MuxedConnection(
            conn,
            peer_id,
            limits=self._limits,
            pulse=self.pulse,
            pressure=self._pressure,
            fault=self._fault,
        )
        muxed.negotiated_muxer_protocol = str(YAMUX)
        muxed.negotiated_security_protocol = conn.negotiated_security_protocol
        return muxed


def transport_options(
    key_pair: Any, config: MeshConfig, *, gate: PeerGate, fault: Fault
) -> tuple[NoiseOnly, YamuxOnly]:
    """What a host is to secure its connections with, and to share them between streams."""
    noise = GatedNoise(key_pair, noise_privkey=create_new_key_pair().private_key)
    noise.gate = gate
    limits = Limits(
        inbound_streams=_STREAMS_BEFORE_REFUSAL * config.max_streams_per_peer,
        window_budget=config.max_held_per_peer,
    )
    pulse = Pulse(ping_interval=config.ping_interval, dead_after=config.dead_after)
    return (
        NoiseOnly(noise, timeout=config.dial_timeout),
        YamuxOnly(limits, pulse, Pressure(config.max_held), fault, timeout=config.dial_timeout),
    )
