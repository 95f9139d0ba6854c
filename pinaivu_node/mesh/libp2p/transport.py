"""Noise and Yamux of py-libp2p, made to survive hostile peers and cancelled callers.

See the package for what is changed and why.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from typing import Any, Final

import trio
from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.protocol.ids import PeerId

logger = logging.getLogger(__name__)

_WINDOW: Final = 256 * 1024
"""Yamux's initial window; we never grow it, so that is what a stream buffers at most."""
_READ_BYTES: Final = 64 * 1024
"""One Noise record at most; what a socket buffer usually holds."""
_WRITE_LIMIT: Final = 10.0
"""Seconds for at most 64 KiB to leave; a link slower than 50 kbit/s cannot carry tokens anyway."""
_MAX_BUFFERED: Final = 32 << 20
"""Unread bytes of one connection over all its streams: 128 full windows."""

PeerGate = Callable[[PeerId], bool]
Fault = Callable[[PeerId, str], None]


class Refused(Exception):
    """We want no connection with this peer."""


class Buffered:
    """A connection or stream whose small reads are served from one large read of it.

    The stock Noise session asks its socket for two bytes, then for a record; gossip asks its stream
    for one byte after another.  Each used to be a turn through the event loop of its own.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._buffer = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes, empty at the end of the stream; cancellation loses none."""
        if not self._buffer:
            self._buffer = await self._raw.read(_READ_BYTES)
        n = len(self._buffer) if n is None else n
        data, self._buffer = self._buffer[:n], self._buffer[n:]
        return data


class _GatedNoise(NoiseTransport):  # type: ignore[misc] # untyped base
    """Noise that hangs up on a banned peer as soon as it has proven who it is."""

    gate: PeerGate

    async def secure_inbound(self, conn: Any) -> Any:
        return self._gated(await super().secure_inbound(Buffered(conn)))

    async def secure_outbound(self, conn: Any, peer_id: Any) -> Any:
        return self._gated(await super().secure_outbound(Buffered(conn), peer_id))

    def _gated(self, secured: Any) -> Any:
        peer = PeerId(str(secured.get_remote_peer()))
        if not self.gate(peer):
            raise Refused(f"{peer} is not admitted")
        return secured


class _Yamux(Yamux):  # type: ignore[misc] # untyped base
    """Yamux that survives cancelled writes, bounds its buffers, and notices death."""

    ping_interval: float
    dead_after: float
    fault: Fault
    _heard_at: float = math.inf

    async def start(self) -> None:
        """Run the connection; its errors are its own and never the swarm's."""
        try:
            await super().start()
        except Exception:
            logger.debug("a connection ended badly", exc_info=True)
        finally:
            with trio.CancelScope(shield=True):
                if not self.event_closed.is_set():
                    await self._cleanup_on_error()

    async def _write_frame(self, data: bytes) -> None:
        async with self._write_lock:
            deadline = trio.current_time() + _WRITE_LIMIT
            with trio.CancelScope(deadline=deadline, shield=True) as scope:
                await self.secured_conn.write(data)
            if scope.cancelled_caught:
                self.fault(PeerId(str(self.peer_id)), "its connection takes no more bytes")
                await self.secured_conn.close()

    async def _read_data_body(self, length: int) -> bytes:
        self._heard_at = trio.current_time()
        if sum(map(len, self.stream_buffers.values())) + length > _MAX_BUFFERED:
            self.fault(PeerId(str(self.peer_id)), "it ignores flow control")
            raise trio.TooSlowError  # the one error upon which the stock reader ends the connection
        body: bytes = await super()._read_data_body(length)
        return body

    async def _measure_rtt_loop(self) -> None:
        """In place of the ping that nobody waits for: close the connection of a silent peer."""
        self._heard_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ping)
            while trio.current_time() < self._heard_at + self.dead_after:  # noqa: ASYNC110
                await trio.sleep_until(self._heard_at + self.dead_after)
            # The reader notices, and cleans up as for any lost connection.
            await self.secured_conn.close()
            nursery.cancel_scope.cancel()

    async def _ping(self) -> None:
        for nonce in itertools.count():
            self._ping_event = trio.Event()
            self._ping_sent_time = trio.current_time()
            try:
                await self._write_frame(_ping_frame(nonce))
            except Exception:  # noqa: BLE001 - the reader will meet it too, and act
                return
            await self._ping_event.wait()
            self._heard_at = trio.current_time()
            await trio.sleep(self.ping_interval)


def _ping_frame(nonce: int) -> bytes:
    return b"\x00\x02\x00\x01\x00\x00\x00\x00" + (nonce & 0xFFFFFFFF).to_bytes(4, "big")


class _Muxer(MuxerMultistream):  # type: ignore[misc] # untyped base
    """Negotiates Yamux and makes ours; the stock one ignores the class it was given."""

    ping_interval: float
    dead_after: float
    fault: Fault

    async def new_conn(self, conn: Any, peer_id: Any) -> Any:
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        muxed = _Yamux(conn, peer_id, is_initiator=conn.is_initiator, on_close=_nothing)
        muxed.ping_interval = self.ping_interval
        muxed.dead_after = self.dead_after
        muxed.fault = self.fault
        return self._annotate_connection(muxed, conn, protocol)


async def _nothing() -> None:
    """`SwarmConn` puts its own callback in this place."""


async def _release_half_windows(stream: Any, *, bytes_read: int = 0) -> None:
    """In place of `_auto_tune_and_send_window_update`: one update for every half window read."""
    stream._pending_recv_release += bytes_read  # noqa: SLF001
    if stream._pending_recv_release >= _WINDOW // 2:  # noqa: SLF001
        released = stream._pending_recv_release  # noqa: SLF001
        stream._pending_recv_release = 0  # noqa: SLF001
        stream.recv_window += released
        await stream.send_window_update(released)


def transport_options(
    key_pair: Any, config: MeshConfig, *, gate: PeerGate, fault: Fault
) -> tuple[Any, Any]:
    """The only security and the only muxer there are.

    Our own Noise session and Yamux, same bytes on the wire, take the place of the two classes
    named here; nothing else in the mesh knows which they are.
    """
    YamuxStream._auto_tune_and_send_window_update = _release_half_windows  # noqa: SLF001
    noise = _GatedNoise(key_pair, noise_privkey=create_new_key_pair().private_key)
    noise.gate = gate
    muxer = _Muxer({YAMUX: _Yamux}, negotiate_timeout=int(config.dial_timeout))
    muxer.ping_interval, muxer.dead_after = config.ping_interval, config.dead_after
    muxer.fault = fault
    return {NOISE: noise}, muxer
