"""Names of peers, requests and models, and the units of money and time.

Different things have different types even where both are strings or integers.  The annotated
twins (`PeerIdField` and so on) are what a message declares: they carry the bounds.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Annotated, Final, NewType

import base58
from pydantic import AfterValidator, Field

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58btc; for Ed25519 it spells the public key (libp2p peer-ids spec)."""
RequestId = NewType("RequestId", str)
"""`req_` and 32 lower-case hex digits; drawn by the gateway, unique for ever."""
ModelName = NewType("ModelName", str)
"""A catalogue name such as `smollm2:135m`."""
Digest = NewType("Digest", str)
"""`sha256:` and 64 lower-case hex digits."""
Topic = NewType("Topic", str)
"""A gossipsub topic."""

NanoX = NewType("NanoX", int)
"""Money.  1 X = 10⁹ NanoX; never a float, at most 2⁵³−1 so that JavaScript can check a receipt."""
Milliseconds = NewType("Milliseconds", int)
"""A duration."""
UnixMilliseconds = NewType("UnixMilliseconds", int)
"""A moment, since the epoch."""
PartsPerMillion = NewType("PartsPerMillion", int)
"""A ratio; 10⁶ is one."""

MAX_SAFE_INTEGER: Final = 2**53 - 1
MILLION: Final = 1_000_000

# A libp2p peer id of an Ed25519 key is the identity multihash (code 0, length 36) of the key's
# protobuf (field 1 = KeyType.Ed25519, field 2 = 32 bytes).  libp2p/specs, peer-ids.md.
_ED25519_PREFIX: Final = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
_REQUEST_ID: Final = re.compile(r"req_[0-9a-f]{32}", re.ASCII)
_MODEL_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(:[a-z0-9][a-z0-9._-]{0,31})?", re.ASCII)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


def peer_id_of(public_key: bytes) -> PeerId:
    """The PeerID that names this 32-byte Ed25519 public key."""
    return PeerId(base58.b58encode(_ED25519_PREFIX + public_key).decode())


# Decoding base58 costs as much as checking half a signature, and the same few thousand names come
# back in every message.  A name takes at most 64 characters: the cache stays below a megabyte.
@functools.lru_cache(maxsize=4096)
def public_key_of(peer: PeerId) -> bytes:
    """The 32-byte Ed25519 key that a PeerID spells; ValueError if it spells none."""
    if len(peer) > 64:
        raise ValueError("a peer id has at most 64 characters")
    decoded = bytes(base58.b58decode(peer))
    if len(decoded) != len(_ED25519_PREFIX) + 32 or not decoded.startswith(_ED25519_PREFIX):
        raise ValueError("not the peer id of an Ed25519 key")
    public_key = decoded[len(_ED25519_PREFIX) :]
    # base58 overlooks white space at the end.  A peer with two names would be missed by a list
    # that denies it under the other one.
    if peer_id_of(public_key) != peer:
        raise ValueError("not the way that this peer id is spelled")
    return public_key


def request_id_of(random_bytes: bytes) -> RequestId:
    """The request id spelled by 16 random bytes."""
    if len(random_bytes) != 16:
        raise ValueError("a request id is made of 16 random bytes")
    return RequestId("req_" + random_bytes.hex())


def digest_of(data: bytes) -> Digest:
    """The SHA-256 digest of some bytes, as it is written everywhere."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def _checked_peer_id(value: str) -> PeerId:
    public_key_of(PeerId(value))
    return PeerId(value)


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if pattern.fullmatch(value) is None:
            raise ValueError(f"not a {what}")
        return value

    return AfterValidator(check)


PeerIdField = Annotated[PeerId, Field(max_length=64), AfterValidator(_checked_peer_id)]
RequestIdField = Annotated[
    RequestId, Field(max_length=36), _matching(_REQUEST_ID, "request id (req_ and 32 hex digits)")
]
ModelNameField = Annotated[ModelName, Field(max_length=97), _matching(_MODEL_NAME, "model name")]
DigestField = Annotated[
    Digest, Field(max_length=71), _matching(_DIGEST, "digest (sha256: and 64 hex digits)")
]
NanoXField = Annotated[NanoX, Field(ge=0, le=MAX_SAFE_INTEGER)]
MillisecondsField = Annotated[Milliseconds, Field(ge=0, le=10**10)]
UnixMillisecondsField = Annotated[UnixMilliseconds, Field(ge=0, le=MAX_SAFE_INTEGER)]
PartsPerMillionField = Annotated[PartsPerMillion, Field(ge=0, le=10**12)]
TokenCount = Annotated[int, Field(ge=0, le=100_000_000)]
"""How many tokens; a context window of 100 million is beyond any model of today."""
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def is_model_name(text: str) -> bool:
    """Whether this text could name a model; clients' input is asked before it becomes a topic."""
    return _MODEL_NAME.fullmatch(text) is not None
