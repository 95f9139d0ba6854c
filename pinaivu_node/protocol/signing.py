r"""Domain-separated Ed25519: who said these very bytes, and for what purpose.

A signature covers `b"pinaivu/1/" + kind + b"\0" + body`, so that a bid can never be passed off as
a receipt.  The bytes received are verified first and only then decoded.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

from nacl.exceptions import BadSignatureError, CryptoError
from nacl.signing import SigningKey, VerifyKey
from pydantic import Field

from pinaivu_node.protocol.errors import LocalProtocolError, PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import (
    Digest,
    PeerId,
    PeerIdField,
    digest_of,
    peer_id_of,
    public_key_of,
)
from pinaivu_node.protocol.wire import Message, encode_body

_DOMAIN: Final = b"pinaivu/1/"
MAX_BODY_BYTES: Final = 64 * 1024
"""The longest signed body; the largest is a receipt, about 3 KiB."""

M = TypeVar("M", bound=Message)


class Envelope(Message, kind="envelope/1"):
    """A signed body on its way; nothing in it is to be believed before `open_untrusted`."""

    content: Annotated[str, Field(max_length=40)]
    """The kind of the message inside."""
    body: Annotated[bytes, Field(max_length=MAX_BODY_BYTES)]
    signer: PeerIdField
    signature: Annotated[bytes, Field(min_length=64, max_length=64)]

    @property
    def digest(self) -> Digest:
        """What names this very signed statement: the digest of the bytes that were signed."""
        return digest_of(signed_bytes(self.content, self.body))


class Signer:
    """This peer's key: the 32-byte seed that is also its libp2p identity."""

    def __init__(self, seed: bytes) -> None:
        self._key = SigningKey(seed)
        self.peer_id: Final = peer_id_of(bytes(self._key.verify_key))

    def seal(self, message: Message) -> Envelope:
        """Sign a message; LocalProtocolError if its body is over the bound."""
        body = encode_body(message)
        if len(body) > MAX_BODY_BYTES:
            raise LocalProtocolError(f"a {message.kind} of {len(body)} bytes is over the limit")
        signature = self._key.sign(signed_bytes(message.kind, body)).signature
        return Envelope(content=message.kind, body=body, signer=self.peer_id, signature=signature)


def signed_bytes(kind: str, body: bytes) -> bytes:
    """What the signature of a message of this kind covers."""
    return _DOMAIN + kind.encode() + b"\0" + body


def open_untrusted(envelope: Envelope, *expected: type[M], signer: PeerId) -> M:
    """The message inside, proven to be said by `signer`, whom the caller already knew.

    Raises RemoteProtocolError: an unexpected kind, another signer, a bad signature (that peer is
    to be banned: transport identity makes it no accident), an undecodable body.
    """
    message = next((each for each in expected if each.kind == envelope.content), None)
    if message is None:
        raise RemoteProtocolError(f"unexpected signed {envelope.content[:40]!r}")
    if envelope.signer != signer:
        raise RemoteProtocolError(
            f"{message.kind} signed by {envelope.signer}, not by {signer}", action=PeerAction.BAN
        )
    try:
        key = VerifyKey(public_key_of(signer))
        key.verify(signed_bytes(message.kind, envelope.body), envelope.signature)
    except (BadSignatureError, CryptoError, ValueError) as exc:
        raise RemoteProtocolError(
            f"the signature on this {message.kind} does not verify", action=PeerAction.BAN
        ) from exc
    return message.from_body_untrusted(envelope.body)
