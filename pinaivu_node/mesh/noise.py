"""The transport phase of libp2p's `/noise`: sealed messages out, opened messages in.  Pure.

    message = uint16(length) ciphertext       length counts the ciphertext, its 16-byte tag included
    ciphertext = ChaCha20-Poly1305(key, nonce, plaintext), no additional data
    nonce = 4 zero bytes, then a little-endian 64-bit count of the messages sent with that key

The handshake, Noise XX, is done when this begins: each direction has a key and a count.  Sealing
happens in one step with no wait inside, so no cancellation can put the count out of step with the
wire.  `cryptography` takes a third of the time that libsodium takes through PyNaCl, at every size,
and seals straight into the buffer that goes to the socket.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from pinaivu_node.protocol.errors import LocalProtocolError, RemoteProtocolError

TAG_BYTES: Final = 16
MAX_CIPHERTEXT: Final = 65_535
MAX_PLAINTEXT: Final = MAX_CIPHERTEXT - TAG_BYTES
_LENGTH_BYTES: Final = 2
_NONCE: Final = struct.Struct("<4xQ")
_LENGTH: Final = struct.Struct("!H")


class Sealer:
    """The outgoing direction."""

    __slots__ = ("_cipher", "_count")

    def __init__(self, key: bytes, *, count: int = 0) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._count = count

    def seal(self, plaintexts: Sequence[bytes]) -> bytearray:
        """One message for each plaintext, as they go on the wire, in order."""
        sealed = bytearray(sum(map(len, plaintexts)) + len(plaintexts) * (2 + TAG_BYTES))
        view = memoryview(sealed)
        start = 0
        for plaintext in plaintexts:
            length = len(plaintext) + TAG_BYTES
            if length > MAX_CIPHERTEXT:
                raise LocalProtocolError(f"{len(plaintext)} bytes in one Noise message")
            _LENGTH.pack_into(sealed, start, length)
            start += _LENGTH_BYTES
            end = start + length
            self._cipher.encrypt_into(_NONCE.pack(self._count), plaintext, None, view[start:end])
            self._count += 1
            start = end
        return sealed


class Opener:
    """The incoming direction; keeps at most one message that has not arrived whole."""

    __slots__ = ("_cipher", "_count", "_partial")

    def __init__(self, key: bytes, *, count: int = 0) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._count = count
        self._partial = bytearray()

    def open_untrusted(self, data: bytes | memoryview) -> list[bytes]:
        """The plaintexts that `data` completes, in order; nothing of `data` is kept by reference.

        After RemoteProtocolError nothing more may be handed in.
        """
        opened: list[bytes] = []
        with memoryview(data) as view:
            start = self._complete_partial(view, opened) if self._partial else 0
            size = len(view)
            while size - start >= _LENGTH_BYTES:
                end = start + _LENGTH_BYTES + (view[start] << 8 | view[start + 1])
                if end > size:
                    break
                with view[start + _LENGTH_BYTES : end] as ciphertext:
                    opened.append(self._open(ciphertext))
                start = end
            if start < size:
                self._partial += view[start:]
        return opened

    def _complete_partial(self, view: memoryview, opened: list[bytes]) -> int:
        """Take from `view` what the kept message lacks; returns how much that was."""
        partial = self._partial
        taken = min(max(0, _LENGTH_BYTES - len(partial)), len(view))
        partial += view[:taken]
        if len(partial) < _LENGTH_BYTES:
            return taken
        missing = _LENGTH_BYTES + (partial[0] << 8 | partial[1]) - len(partial)
        more = min(missing, len(view) - taken)
        partial += view[taken : taken + more]
        if more == missing:
            opened.append(self._open(bytes(partial[_LENGTH_BYTES:])))
            partial.clear()
        return taken + more

    def _open(self, ciphertext: bytes | memoryview) -> bytes:
        try:
            plaintext = self._cipher.decrypt(_NONCE.pack(self._count), ciphertext, None)
        except (InvalidTag, ValueError) as exc:
            raise RemoteProtocolError("a Noise message that its key does not open") from exc
        self._count += 1
        return plaintext
