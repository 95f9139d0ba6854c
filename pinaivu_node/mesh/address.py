"""The text of a multiaddr, as far as it matters to us: who is expected there.  Pure."""

from __future__ import annotations

from pinaivu_node.mesh.mesh import PeerUnreachable
from pinaivu_node.protocol.ids import PeerId, public_key_of

_MAX_ADDRESS_CHARACTERS = 512
"""A DNS name has at most 253; the rest of a multiaddr is short."""


def split_address(address: str) -> tuple[str, PeerId]:
    """Where to dial and whom to expect there; PeerUnreachable if the text says neither.

    Addresses come from other peers too, so this accepts any text and blames nobody.
    """
    location, found, peer = address.rpartition("/p2p/")
    if not found or not location.startswith("/") or len(address) > _MAX_ADDRESS_CHARACTERS:
        raise PeerUnreachable(f"{address[:80]!r} is not a multiaddr that ends in /p2p/<peer id>")
    try:
        public_key_of(PeerId(peer))
    except ValueError as exc:
        raise PeerUnreachable(f"{address[:80]!r} names no Ed25519 peer: {exc}") from exc
    return location, PeerId(peer)
