"""API keys: `sk-pnv-` and 256 random bits, of which only the SHA-256 is kept.

No slow hash such as argon2: that protects passwords, which can be guessed.  Nobody guesses 256
random bits, so a fast hash loses nothing, and it can be looked up in an index on every request.
The lookup by hash is also why no comparison in constant time is needed: what an attacker could
time is the hash of her guess, which tells her nothing about a key.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Final

from pinaivu_node.protocol.ids import UnixMilliseconds

PREFIX: Final = "sk-pnv-"
SECRET_BYTES: Final = 32
DISPLAY_CHARACTERS: Final = len(PREFIX) + 8
"""Eight characters name a key among millions, and leave 208 bits unknown."""
LONGEST_KEY: Final = 256
"""A longer header is no key of anybody's; it is not even hashed."""
LONGEST_NAME: Final = 100


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is kept; the key itself is shown once and never again."""

    hash: str
    prefix: str
    """What the operator sees and revokes by."""
    name: str
    tenant: bytes
    """Random, per key: salts the prefix cache and the fingerprints of this key's prompts."""
    created_at: UnixMilliseconds
    revoked_at: UnixMilliseconds | None = None


def key_of(random_bytes: bytes) -> str:
    """The key spelled by 32 random bytes."""
    if len(random_bytes) != SECRET_BYTES:
        raise ValueError(f"a key is made of {SECRET_BYTES} random bytes")
    return PREFIX + base64.urlsafe_b64encode(random_bytes).decode().rstrip("=")


def hash_of(key: str) -> str:
    """What is stored of a key, and looked up."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def prefix_of(key: str) -> str:
    """What may be shown of a key."""
    return key[:DISPLAY_CHARACTERS]


def bearer_untrusted(header: str | None) -> str | None:
    """The key in an Authorization header; None if there is none.  The scheme's case is free."""
    if header is None:
        return None
    scheme, _, key = header.strip().partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key or len(key) > LONGEST_KEY:
        return None
    return key
