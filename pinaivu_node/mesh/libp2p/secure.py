"""Noise: py-libp2p shakes hands, our own session carries what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from libp2p.io.exceptions import ConnectionClosedError
from libp2p.security.base_session import BaseSession
from libp2p.security.noise.transport import Transport as NoiseTransport

from pinaivu_node.mesh.libp2p.channel import Channel, channel_of
from pinaivu_node.mesh.noise import MAX_PLAINTEXT, Opener, Sealer
from pinaivu_node.protocol.ids import PeerId

_READ_BYTES: Final = 64 * 1024

PeerGate = Callable[[PeerId], bool]


class Refused(Exception):
    """We want no connection with this peer."""


class Buffered:
    """A connection or stream whose small reads are served from one large read of it.

    The stock handshake asks its socket for two bytes, then for a message; gossip asks its stream
    for one byte after another.  Each used to be a turn through the event loop of its own.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.buffered = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes, empty at the end of the stream; cancellation loses none."""
        if not self.buffered:
            self.buffered = await self.raw.read(_READ_BYTES)
        n = len(self.buffered) if n is None else n
        data, self.buffered = self.buffered[:n], self.buffered[n:]
        return data


class NoiseSession(BaseSession):  # type: ignore[misc] # untyped base
    """A connection after its handshake.

    It is read and written here only to agree on a muxer, and then taken apart by it.
    """

    def __init__(self, stock: Any, raw: Any, arrived: bytes) -> None:
        super().__init__(
            local_peer=stock.local_peer,
            local_private_key=stock.local_private_key,
            remote_peer=stock.remote_peer,
            remote_permanent_pubkey=stock.remote_permanent_pubkey,
            is_initiator=stock.is_initiator,
        )
        state = stock.conn.noise_state.noise_protocol
        self._raw = raw
        self.sealer = Sealer(state.cipher_state_encrypt.k, count=state.cipher_state_encrypt.n)
        self.opener = Opener(state.cipher_state_decrypt.k, count=state.cipher_state_decrypt.n)
        self.channel: Channel = channel_of(raw)
        self.plaintext = b"".join(self.opener.open_untrusted(arrived))

    async def read(self, n: int | None = None) -> bytes:
        """Exactly `n` bytes, or all that there are."""
        while len(self.plaintext) < (1 if n is None else n):
            data = await self._raw.read(_READ_BYTES)
            if not data:
                raise ConnectionClosedError("Connection closed")
            self.plaintext += b"".join(self.opener.open_untrusted(data))
        n = len(self.plaintext) if n is None else n
        data, self.plaintext = self.plaintext[:n], self.plaintext[n:]
        return data

    async def write(self, data: bytes) -> None:
        """Seal and send; a write that is cancelled half way leaves a connection to be closed."""
        pieces = [data[at : at + MAX_PLAINTEXT] for at in range(0, len(data), MAX_PLAINTEXT)]
        await self._raw.write(bytes(self.sealer.seal(pieces)))

    async def close(self) -> None:
        """Close the socket under it."""
        await self.channel.close()

    def get_remote_address(self) -> Any:
        """Host and port of the peer."""
        return self._raw.get_remote_address()

    def get_transport_addresses(self) -> Any:
        """The same as multiaddrs."""
        return self._raw.get_transport_addresses()

    def get_connection_type(self) -> Any:
        """Direct or relayed."""
        return self._raw.get_connection_type()


class GatedNoise(NoiseTransport):  # type: ignore[misc] # untyped base
    """Noise that hangs up on a banned peer as soon as it has proven who it is."""

    gate: PeerGate

    async def secure_inbound(self, conn: Any) -> NoiseSession:
        """As the listener."""
        buffered = Buffered(conn)
        return self._gated(await super().secure_inbound(buffered), buffered)

    async def secure_outbound(self, conn: Any, peer_id: Any) -> NoiseSession:
        """As the dialler, who expects this peer."""
        buffered = Buffered(conn)
        return self._gated(await super().secure_outbound(buffered, peer_id), buffered)

    def _gated(self, stock: Any, buffered: Buffered) -> NoiseSession:
        peer = PeerId(str(stock.get_remote_peer()))
        if not self.gate(peer):
            raise Refused(f"{peer} is not admitted")
        return NoiseSession(stock, buffered.raw, buffered.buffered)
