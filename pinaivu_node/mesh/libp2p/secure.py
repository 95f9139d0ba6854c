"""Noise: py-libp2p shakes hands, our own session carries what follows.

A connection is set up in three round trips, TCP's own included, where asking and waiting for each
answer takes six: the dialler says `/multistream/1.0.0`, `/noise` and its first Noise message in one
breath, and its last Noise message together with `/yamux/1.0.0`.  Listeners answer as if they had
been asked one by one, whatever libp2p they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from libp2p.io.exceptions import ConnectionClosedError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.base_session import BaseSession
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport

from pinaivu_node.mesh.libp2p.channel import Channel, channel_of
from pinaivu_node.mesh.libp2p.corked import Corked
from pinaivu_node.mesh.noise import MAX_PLAINTEXT, Opener, Sealer
from pinaivu_node.protocol.ids import PeerId

_READ_BYTES: Final = 64 * 1024
MULTISTREAM: Final = "/multistream/1.0.0"

PeerGate = Callable[[PeerId], bool]


class Refused(Exception):
    """We want no connection with this peer."""


class NotSpoken(Exception):
    """The peer does not speak the only protocol that we do."""


def proposal(protocol: str) -> bytes:
    """The greeting of multistream-select and the wish for this protocol, before any answer."""
    return b"".join(
        bytes([len(text) + 1]) + text.encode() + b"\n" for text in (MULTISTREAM, protocol)
    )


async def check_agreed(reader: Any, protocol: str) -> None:
    """Read the answer to a `proposal`; NotSpoken if it is no yes."""
    communicator = MultiselectCommunicator(reader)
    for expected in (MULTISTREAM, protocol):
        answer = await communicator.read()
        if answer.rstrip("\n") != expected:
            raise NotSpoken(f"the peer answered {answer[:40]!r} to {expected}")


async def answer_proposals(reader: Any, protocol: str, *, timeout: float) -> None:
    """As the listener, agree on this protocol and no other; MultiselectError if that fails."""
    multiselect = Multiselect({})
    multiselect.add_handler(protocol, None)
    await multiselect.negotiate(MultiselectCommunicator(reader), timeout)


class NoiseSession(BaseSession):  # type: ignore[misc] # untyped base
    """A connection after its handshake.

    It is read and written here only to agree on a muxer, and then taken apart by it.
    """

    def __init__(self, stock: Any, corked: Corked) -> None:
        super().__init__(
            local_peer=stock.local_peer,
            local_private_key=stock.local_private_key,
            remote_peer=stock.remote_peer,
            remote_permanent_pubkey=stock.remote_permanent_pubkey,
            is_initiator=stock.is_initiator,
        )
        state = stock.conn.noise_state.noise_protocol
        self._corked = corked
        self.sealer = Sealer(state.cipher_state_encrypt.k, count=state.cipher_state_encrypt.n)
        self.opener = Opener(state.cipher_state_decrypt.k, count=state.cipher_state_decrypt.n)
        self.channel: Channel = channel_of(corked.raw)
        self.carrier = corked.raw.stream
        self.plaintext = b"".join(self.opener.open_untrusted(corked.take_arrived()))

    async def read(self, n: int | None = None) -> bytes:
        """Exactly `n` bytes, or all that there are."""
        while len(self.plaintext) < (1 if n is None else n):
            data = await self._corked.read(_READ_BYTES)
            if not data:
                raise ConnectionClosedError("Connection closed")
            self.plaintext += b"".join(self.opener.open_untrusted(data))
        n = len(self.plaintext) if n is None else n
        data, self.plaintext = self.plaintext[:n], self.plaintext[n:]
        return data

    async def write(self, data: bytes) -> None:
        """Seal, to leave with the next read."""
        pieces = [data[at : at + MAX_PLAINTEXT] for at in range(0, len(data), MAX_PLAINTEXT)]
        await self._corked.write(bytes(self.sealer.seal(pieces)))

    def take_unsent(self) -> bytes:
        """What was written since the last read, for whoever takes the connection over."""
        return self._corked.take_unsent()

    async def close(self) -> None:
        """Close the socket under it."""
        await self.channel.close()

    def get_remote_address(self) -> Any:
        """Host and port of the peer."""
        return self._corked.raw.get_remote_address()

    def get_transport_addresses(self) -> Any:
        """The same as multiaddrs."""
        return self._corked.raw.get_transport_addresses()

    def get_connection_type(self) -> Any:
        """Direct or relayed."""
        return self._corked.raw.get_connection_type()


class GatedNoise(NoiseTransport):  # type: ignore[misc] # untyped base
    """Noise that hangs up on a banned peer as soon as it has proven who it is."""

    gate: PeerGate

    async def secure_inbound(self, conn: Any) -> NoiseSession:
        """As the listener, once `/noise` is agreed on."""
        return self._gated(await super().secure_inbound(conn), conn)

    async def secure_outbound(self, conn: Any, peer_id: Any) -> NoiseSession:
        """As the dialler, who expects this peer, and has not waited for an answer yet."""
        return self._gated(await super().secure_outbound(conn, peer_id), conn)

    def _gated(self, stock: Any, corked: Corked) -> NoiseSession:
        peer = PeerId(str(stock.get_remote_peer()))
        if not self.gate(peer):
            raise Refused(f"{peer} is not admitted")
        return NoiseSession(stock, corked)


class NoiseOnly:
    """In place of the stock choice between security transports: there is one."""

    def __init__(self, noise: GatedNoise, *, timeout: float) -> None:
        self.transports = {NOISE: noise}
        self._noise = noise
        self._timeout = timeout

    async def secure_inbound(self, conn: Any) -> NoiseSession:
        """As the listener."""
        corked = Corked(conn)
        await answer_proposals(corked, NOISE, timeout=self._timeout)
        return self._annotated(await self._noise.secure_inbound(corked))

    async def secure_outbound(self, conn: Any, peer_id: Any) -> NoiseSession:
        """As the dialler, who expects this peer."""
        corked = Corked(conn, first=lambda reader: check_agreed(reader, NOISE))
        await corked.write(proposal(NOISE))
        return self._annotated(await self._noise.secure_outbound(corked, peer_id))

    def _annotated(self, session: NoiseSession) -> NoiseSession:
        session.negotiated_security_protocol = str(NOISE)
        return session
