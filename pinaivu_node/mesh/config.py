"""Every knob of the mesh, frozen.  Durations are in seconds."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, PositiveFloat, PositiveInt

from pinaivu_node.mesh.pipes import RelayLimits


class MeshConfig(BaseModel, frozen=True, extra="forbid"):
    """How one peer takes part.  The defaults suit a provider; a coordinator or gateway is a hub."""

    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    """Multiaddrs to listen on; none for a peer that only dials out."""
    tls_certificate: Path | None = None
    """PEM, for addresses that end in /wss; with its chain."""
    tls_key: Path | None = None
    """PEM; None: in the same file."""
    proxy: str | None = None
    """The HTTP proxy that WebSockets are dialled through, like http://proxy.example.org:3128."""
    announce: tuple[str, ...] = ()
    """Multiaddrs to tell others instead of the ones listened on, for a peer behind NAT."""
    relays: tuple[str, ...] = ()
    """Who passes others on to us, announced behind our own addresses: a multiaddr that ends in
    /p2p/<relay>, which we stay connected to, or /p2p/<relay> alone for one that somebody else
    keeps and that those who dial us are connected to as well."""
    relay: RelayLimits | None = None
    """Pass on bytes between peers that cannot dial each other, within these; None: do not."""
    hub: bool = False
    """Whether everybody dials us.  A hub passes gossip on to all its neighbours: gossipsub prunes a
    star down to a handful and then loses most messages."""

    max_connections: PositiveInt = 1024
    """All connections together; each costs about 40 KiB and a file descriptor."""
    max_half_open: PositiveInt = 128
    """Handshakes under way; the oldest is dropped for the newest, so that a flood of silent
    connections delays an honest peer, which needs 10 ms, but does not keep it out."""
    max_streams_per_peer: PositiveInt = 128
    """Inbound streams of one peer at once.  An honest peer keeps one per protocol; tests and
    bursts stay under a hundred.  One more costs the peer its connections."""
    max_held_per_peer: PositiveInt = 32 << 20
    """Bytes of one peer that we hold for slow readers: what its windows may grow to together, and
    again as much for half frames."""
    max_held: PositiveInt = 512 << 20
    """Bytes that all peers together may have us hold unread; the one that has most is dropped.
    Honest ones have next to none: what they send is read as it comes."""
    max_gossip_per_second: PositiveInt = 1000
    """Gossip messages forwarded by one peer; more are dropped unread.  A hub that auctions 100
    jobs a second to 10 models stays well under it."""

    dial_timeout: PositiveFloat = 5.0
    """TCP, Noise and Yamux take six round trips: 2 s between continents on a bad day."""
    open_timeout: PositiveFloat = 5.0
    """Opening a stream takes two round trips; a peer that cannot in this time is hung."""
    detour_quiet: PositiveFloat = 60.0
    """A connection through a relay is given up for a direct one when no frame has passed for this
    long: a model that is being loaded is silent for less."""
    ping_interval: PositiveFloat = 1.0
    dead_after: PositiveFloat = 3.5
    """A peer not heard for this long, though pinged, is gone: with the interval and the tick that
    notices, a hung peer is dropped within 5 s."""
    stall_limit: PositiveFloat = 10.0
    """A peer that reads nothing for this long while we have frames for it is dropped."""
