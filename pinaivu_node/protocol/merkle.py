"""The Merkle tree hash of RFC 9162 §2.1.1 over SHA-256: one digest that commits to a list."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pinaivu_node.protocol.ids import Digest


def tree_root(leaves: Sequence[bytes]) -> Digest:
    """The root over these leaves, in their order; of the empty list, the hash of nothing."""
    return Digest(
        "sha256:" + _root([hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]).hex()
    )


def _root(hashes: list[bytes]) -> bytes:
    if not hashes:
        return hashlib.sha256().digest()
    # Pairing neighbours level by level, an odd last one moving up unpaired, gives the same tree
    # as the RFC's split at the largest power of two below the size.
    while len(hashes) > 1:
        paired = [
            hashlib.sha256(b"\1" + left + right).digest()
            for left, right in zip(hashes[::2], hashes[1::2], strict=False)
        ]
        if len(hashes) % 2:
            paired.append(hashes[-1])
        hashes = paired
    return hashes[0]
