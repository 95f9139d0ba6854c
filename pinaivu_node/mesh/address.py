"""The text of a multiaddr, as far as it matters to us: who is expected there.  Pure."""

from __future__ import annotations

from typing import Final

from pinaivu_node.mesh.mesh import PeerUnreachable
from pinaivu_node.protocol.ids import PeerId, public_key_of

CIRCUIT: Final = "/p2p-circuit"

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


def is_circuit(address: str) -> bool:
    """Whether a multiaddr, or the location in it, leads through a relay."""
    return CIRCUIT in address


def split_circuit(location: str) -> tuple[str | None, PeerId]:
    """Of a location through a relay: where to dial the relay, if that is said, and who it is.

    PeerUnreachable for one that leads through several: nobody passes on what is passed on.
    """
    relay, _, rest = location.partition(CIRCUIT)
    if rest:
        raise PeerUnreachable(f"{location[:80]!r} leads through more than one relay")
    # A relay that is connected already is named and no more: /p2p/<relay>/p2p-circuit.
    where, peer = split_address(relay if not relay.startswith("/p2p/") else f"/any{relay}")
    return (None if where == "/any" else relay), peer
