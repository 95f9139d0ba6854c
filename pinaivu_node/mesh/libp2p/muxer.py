"""Our Yamux on trio, in the shape that py-libp2p wants a muxed connection to have.

One task reads.  Nobody else ever waits for the socket but a task that is started when it takes no
more, and ends when it does.  Between what a caller does to a stream and the bytes on the wire there
is no checkpoint, so a cancelled read or write has happened wholly or not at all.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio
from libp2p.abc import IMuxedConn
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable

from pinaivu_node.mesh.conduct import Offence
from pinaivu_node.mesh.libp2p.flusher import Flusher
from pinaivu_node.mesh.libp2p.muxed_stream import MuxedStream
from pinaivu_node.mesh.libp2p.pressure import Pressure
from pinaivu_node.mesh.libp2p.pulse import Pulse
from pinaivu_node.mesh.libp2p.secure import NoiseSession
from pinaivu_node.mesh.yamux import events as told
from pinaivu_node.mesh.yamux.connection import Connection, Limits
from pinaivu_node.mesh.yamux.frames import Reason
from pinaivu_node.mesh.yamux.stream import Stream
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId

logger = logging.getLogger(__name__)

Fault = Callable[[PeerId, str, Offence], None]

_BATCH_BYTES: Final = 192 * 1024
"""Sealed together and handed to the socket in one call: three full Noise messages and more."""
_GOODBYE: Final = 0.5
"""Seconds for the last bytes to leave before the socket is closed."""
_LINGER: Final = 5.0
"""Seconds for open streams to end after the peer said that it goes away."""
_LOST: Final = (OSError, trio.ClosedResourceError, trio.BrokenResourceError)


class MuxedConnection(IMuxedConn):  # type: ignore[misc] # untyped base
    """Made by the muxer of our host; `start` is run by the swarm, and owns everything here."""

    def __init__(
        self,
        session: NoiseSession,
        peer_id: Any,
        *,
        limits: Limits,
        pulse: Pulse,
        pressure: Pressure,
        fault: Fault,
    ) -> None:
        self.secured_conn = session
        self.peer_id = peer_id
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None
        self.heard_at = trio.current_time()
        self.measured_at = -math.inf  # so that the first look at it asks for a round trip
        self.bytes_sent = self.bytes_received = 0
        self._core = Connection(is_dialler=session.is_initiator, limits=limits)
        self._channel = session.channel
        self._pulse = pulse
        self._pressure = pressure
        self._fault = fault
        self._flusher = Flusher.of_this_run()
        self._dirty = False
        self._unsent = memoryview(session.take_unsent())
        self._draining = False
        self._drained = trio.Event()
        self._accepted: deque[MuxedStream] = deque()
        self._acceptors = trio.lowlevel.ParkingLot()
        self._openers = trio.lowlevel.ParkingLot()
        self._leave_at: float | None = None
        self._over = False
        self._nursery: trio.Nursery | None = None
        self.negotiated_muxer_protocol = ""
        self.negotiated_security_protocol = ""

    # --- what py-libp2p asks ----------------------------------------------------------------------

    @property
    def is_initiator(self) -> bool:
        """Whether we dialled."""
        return bool(self.secured_conn.is_initiator)

    @property
    def is_established(self) -> bool:
        """Whether streams may be opened."""
        return self.event_started.is_set() and not self._over

    @property
    def is_closed(self) -> bool:
        """Whether it is over."""
        return self._over

    @property
    def round_trip(self) -> float | None:
        """Seconds, smoothed; None until measured."""
        return self._core.round_trip

    @property
    def streams(self) -> int:
        """How many are open."""
        return self._core.streams

    @property
    def queued(self) -> int:
        """Bytes that wait to be sent; adds them up."""
        return len(self._unsent) + self._core.unsent

    async def open_stream(self) -> MuxedStream:
        """A new stream; waits while too many of ours are not yet taken by the peer."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._core.can_open:
            if self._over or self._core.is_leaving:
                raise MuxedConnUnavailable("Connection closed")
            await self._openers.park()
        stream = MuxedStream(self, self._core.open_stream())
        self.touch()
        return stream

    async def accept_stream(self) -> MuxedStream:
        """The next stream that the peer opened; MuxedConnUnavailable at the end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._accepted:
            if self._over:
                raise MuxedConnUnavailable("Connection closed")
            await self._acceptors.park()
        return self._accepted.popleft()

    def get_remote_address(self) -> Any:
        """Host and port of the peer."""
        return self.secured_conn.get_remote_address()

    def get_transport_addresses(self) -> Any:
        """The same as multiaddrs."""
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> Any:
        """Direct or relayed."""
        return self.secured_conn.get_connection_type()

    # --- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read until the connection is over; raises nothing but cancellation."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._pulse.watch(self, first=self.is_initiator)
                self._pressure.watch(self)
                self.event_started.set()
                self.flush()
                try:
                    await self._receive()
                finally:
                    self._nursery = None  # it takes no task more while it closes
                nursery.cancel_scope.cancel()
        except Exception:
            logger.exception("a connection to %s broke", self.peer_id)
        finally:
            with trio.CancelScope(shield=True):
                await self._finish()

    async def _receive(self) -> None:
        opener, core = self.secured_conn.opener, self._core
        plaintexts = [self.secured_conn.plaintext]
        try:
            while True:
                now = self.heard_at = trio.current_time()
                for plaintext in plaintexts:
                    core.receive_untrusted(plaintext, now=now)
                self._pressure.received(sum(map(len, plaintexts)))
                self._dispatch()
                if core.has_data_to_send:
                    self.touch()
                data = await self._channel.receive()
                if not data:
                    return
                self.bytes_received += len(data)
                plaintexts = opener.open_untrusted(data)
        except RemoteProtocolError as exc:
            self._dispatch()
            self._core.go_away(Reason.PROTOCOL_ERROR)
            self.flush()
            self._fault(PeerId(str(self.peer_id)), str(exc), Offence.PROTOCOL)
        except _LOST:
            pass
        except Exception as exc:  # noqa: BLE001 - what a layered connection of libp2p may raise
            logger.debug("a connection was lost: %r", exc)

    async def close(self) -> None:
        """Say that we go away, give the last bytes a moment to leave, and close the socket."""
        if not self._over:
            self._core.go_away()
            self.flush()
            with trio.CancelScope(shield=True), trio.move_on_after(_GOODBYE):
                while self._draining and not self._over:
                    await self._drained.wait()
        with trio.CancelScope(shield=True):
            await self._finish()

    async def _finish(self) -> None:
        first, self._over = not self._over, True
        if not first:
            return
        self._pulse.unwatch(self)
        self._pressure.unwatch(self)
        self._core.lose()
        self._dispatch()
        self._acceptors.unpark_all()
        self._openers.unpark_all()
        self._drained.set()
        try:
            await self._channel.close()
        except Exception:
            logger.debug("a socket could not be closed", exc_info=True)
        self.event_closed.set()
        if self.on_close is not None:
            await self.on_close()

    # --- pulse ------------------------------------------------------------------------------------

    def ping(self) -> None:
        """See `Patient.ping`."""
        now = trio.current_time()
        if self._leave_at is not None and (now > self._leave_at or not self._core.streams):
            self.give_up("it went away")
            return
        self._core.ping(now=now)
        self.touch()

    def give_up(self, reason: str) -> None:
        """See `Patient.give_up`."""
        logger.debug("gave up %s: %s", self.peer_id, reason)
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    # --- pressure ---------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """See `Holder.held`."""
        return self._core.unread

    def relieve(self, reason: str) -> None:
        """See `Holder.relieve`."""
        self._core.reset_all()
        self.settle()
        self._fault(PeerId(str(self.peer_id)), reason, Offence.HOARDING)
        self.give_up(reason)

    # --- out --------------------------------------------------------------------------------------

    def touch(self) -> None:
        """Something was queued: let it leave at the end of this turn of the event loop."""
        if not self._dirty and not self._draining:
            self._dirty = True
            self._flusher.add(self._flush_at_end_of_turn)

    def touch_if_needed(self) -> None:
        """The same, after a read that may have given back a window."""
        if self._core.has_data_to_send:
            self.touch()

    def settle(self) -> None:
        """A stream was ended or broken off by its owner: tell whom it concerns, and the peer."""
        self._dispatch()
        self.touch_if_needed()

    def flush(self) -> None:
        """Let what is queued leave now, as far as the socket takes it; never waits or raises."""
        if self._draining or self._over:
            return
        if not self._send_what_fits():
            self._draining = True
            self._start_draining()
        self._dispatch()

    def _flush_at_end_of_turn(self) -> None:
        self._dirty = False
        if self._draining or self._over:
            return
        if not self._send_what_fits():
            self._draining = True
            self._flusher.later(self._start_draining)
        if self._core.has_events:
            self._flusher.later(self._dispatch)

    def _start_draining(self) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._drain)

    def _send_what_fits(self) -> bool:
        """False if the socket takes no more, and something is left."""
        core = self._core
        while True:
            if not self._unsent:
                records = []
                size = 0
                while size < _BATCH_BYTES and (record := core.data_to_send()):
                    records.append(record)
                    size += len(record)
                if not records:
                    return True
                self._unsent = memoryview(self.secured_conn.sealer.seal(records))
            try:
                sent = self._channel.send_nowait(self._unsent)
            except _LOST:
                # The reader meets the same end, and acts on it.
                self._unsent = memoryview(b"")
                return True
            self.bytes_sent += sent
            if sent < len(self._unsent):
                self._unsent = self._unsent[sent:]
                return False
            self._unsent = memoryview(b"")

    async def _drain(self) -> None:
        """Wait for the socket, until it has taken everything."""
        try:
            while self._unsent:
                sent = await self._channel.send(self._unsent)
                self.bytes_sent += sent
                self._unsent = self._unsent[sent:]
                if not self._unsent:
                    self._send_what_fits()
                self._dispatch()
        except _LOST:
            self._unsent = memoryview(b"")
        except Exception as exc:  # noqa: BLE001 - what a layered connection of libp2p may raise
            logger.debug("a connection takes no more: %r", exc)
        self._draining = False
        self.touch_if_needed()
        drained, self._drained = self._drained, trio.Event()
        drained.set()

    # --- events -----------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Tell tasks and streams what happened."""
        for event in self._core.take_events():
            match event:
                case told.Readable(stream) if stream.owner is not None:
                    stream.owner.on_readable()
                case told.Writable(stream) if stream.owner is not None:
                    stream.owner.on_writable()
                case told.Opened(stream):
                    self._on_opened(stream)
                case told.Closed(stream) if stream.owner is not None:
                    stream.owner.on_closed()
                case told.Acknowledged():
                    self._openers.unpark()
                case told.Measured():
                    self.measured_at = trio.current_time()
                case told.GoneAway():
                    self._leave_at = trio.current_time() + _LINGER
                    self._openers.unpark_all()
                case _:
                    pass

    def _on_opened(self, stream: Stream) -> None:
        self._accepted.append(MuxedStream(self, stream))
        self._acceptors.unpark()
