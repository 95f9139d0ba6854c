"""Connections through a relay: a pipe of frames in the place of a socket.

Handshake, Noise and Yamux in a pipe are those of a socket, so the relay sees ciphertext and cannot
pass itself off as anybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from libp2p.abc import ConnectionType
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID

from pinaivu_node.mesh.address import CIRCUIT, split_circuit
from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.mesh import (
    FrameStream,
    Mesh,
    MeshError,
    MeshStatistics,
    PeerUnreachable,
)
from pinaivu_node.mesh.relay import Relay, reach
from pinaivu_node.protocol.ids import PeerId
from pinaivu_node.protocol.relay import MAX_CHUNK_BYTES
from pinaivu_node.protocol.topics import RELAY

_MOST_TOLD: Final = 8
"""Addresses that a roster has room for."""
_MOST_THROUGH_RELAYS: Final = 4


class FramePipe(ReadWriteCloser):  # type: ignore[misc] # untyped base
    """The bytes of a pipe, in the shape that libp2p wants a socket to have."""

    def __init__(self, stream: FrameStream) -> None:
        self._stream = stream
        self._arrived = b""

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes; ConnectionClosedError at the end."""
        while not self._arrived:
            try:
                self._arrived = await self._stream.receive()
            except MeshError as exc:
                raise ConnectionClosedError(f"the pipe was lost: {exc}") from exc
        data, self._arrived = self._arrived[:n], self._arrived[len(self._arrived[:n]) :]
        return data

    async def write(self, data: bytes) -> None:
        """Send all of this; ConnectionClosedError if it cannot be."""
        try:
            for at in range(0, len(data), MAX_CHUNK_BYTES):
                await self._stream.send(data[at : at + MAX_CHUNK_BYTES])
        except MeshError as exc:
            raise ConnectionClosedError(f"the pipe was lost: {exc}") from exc

    async def close(self) -> None:
        """Break off: whoever reads or writes gets an error."""
        self._stream.reset()

    def get_remote_address(self) -> Any:
        """The relay, for logs."""
        return ("relay", self._stream.peer)


class Circuits:
    """What a mesh does with relays: passing on, being reached and reaching."""

    def __init__(self, mesh: Mesh, host: Any, config: MeshConfig) -> None:
        self._mesh = mesh
        self._host = host
        relays = {config_address: _relay_in(config_address) for config_address in config.relays}
        self._relay = Relay(
            mesh.open, self._accept, limits=config.relay, relays=frozenset(relays.values())
        )
        self.kept = tuple(address for address in relays if not address.startswith("/p2p/"))
        """Relays that nobody but us stays connected to."""
        self._addresses = tuple(f"{each}{CIRCUIT}/p2p/{mesh.peer_id}" for each in relays)

    def behind(self, ours: Sequence[str]) -> tuple[str, ...]:
        """Our own addresses, and behind them those under which relays pass others on to us.

        As many as others hear of: the last way to us must not fall off the end.
        """
        through = self._addresses[:_MOST_THROUGH_RELAYS]
        return (*ours[: _MOST_TOLD - len(through)], *through)

    async def serve(self, stream: FrameStream) -> None:
        """Serve a stream of the relay's protocol."""
        await self._relay.serve(stream)

    async def dial(self, location: str, peer: PeerId) -> None:
        """Connect through a relay, and prove that it is this peer; raises what libp2p raises."""
        address, relay = split_circuit(location)
        if relay == self._mesh.peer_id:
            raise PeerUnreachable("we are that relay ourselves")
        if address is not None:
            await self._mesh.dial(address)
        stream = await self._mesh.open(relay, RELAY)
        try:
            await reach(stream, peer)
            raw = RawConnection(FramePipe(stream), True, ConnectionType.RELAYED)  # noqa: FBT003
            swarm = self._host.get_network()
            await swarm.upgrade_outbound_raw_conn(raw, ID.from_string(peer))
        except BaseException:
            stream.reset()
            raise

    async def _accept(self, stream: FrameStream, source: PeerId) -> None:
        """Serve the connection in a pipe until it is over."""
        del source  # the handshake in the pipe proves who it is
        await self._host.get_network()._handle_inbound_connection(  # noqa: SLF001
            FramePipe(stream), f"a pipe of {stream.peer}"
        )

    def counted_in(self, statistics: MeshStatistics) -> MeshStatistics:
        """The same with what was passed on."""
        book = self._relay.book
        if book is None:
            return statistics
        return replace(
            statistics,
            pipes=len(book),
            pipes_made=book.pipes_made,
            pipes_refused=book.refused,
            pipe_bytes=book.bytes_passed,
        )


def _relay_in(address: str) -> PeerId:
    return split_circuit(address + CIRCUIT)[1]
