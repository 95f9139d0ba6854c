"""A py-libp2p host that is safe to expose, and every private attribute of py-libp2p we touch.

py-libp2p 0.8.1 speaks the protocols well and takes care of nothing else.  What is changed here,
and why, in the order of a connection's life:

* Security is Noise and nothing else: by default a peer may choose plaintext, which proves no key.
* The inbound limiter counts connections of the past and refuses all after 250 of them, and parks a
  task for each.  Our `_InboundGate` replaces the whole handler: it bounds handshakes, not history.
* A dial waits 250 ms for a second address even when there is none.
* The auto-connector dials whoever was ever heard of, and a watermark of 0 does not stop it.
* The resource manager's limits, breakers and "graceful degradation" act on their own account; we
  take it away and count for ourselves.
* A stream that is cancelled in mid-write leaves the Noise cipher of the whole connection out of
  step; every write of `_Yamux` is shielded.  One that blocks for ever ends the connection.
* A peer that hangs is never dropped: `_Yamux` pings, and closes what does not answer.
* A peer that ignores flow control fills our memory: `_Yamux` checks before it reads a body.
* Every read sends a window update, also the one-byte reads of multistream-select: half of all
  frames on the wire.  We send one for every half window.
* An exception in a handler ends the process or leaves a connection that accepts no more streams.
* A gossip message with garbage in it ends the process.
* Gossip forgets what a live peer subscribed to, in the two cases told of in `SafePubsub`.
* Gossip sequence numbers start at the time in seconds: a publisher that restarts repeats them, and
  its messages are dropped as old.

`tests/mesh/test_libp2p_internals.py` fails when an upgrade moves any of this.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

with warnings.catch_warnings():
    # Generated protobuf code and multicodec tables warn as they are imported; nothing of ours.
    warnings.simplefilter("ignore")
    import libp2p.network.auto_connector as auto_connector_module
    import libp2p.network.connection.swarm_connection as swarm_connection_module
    import libp2p.network.swarm as swarm_module
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
    from libp2p.custom_types import TProtocol
    from libp2p.network.config import ConnectionConfig, RetryConfig
    from libp2p.network.connection.raw_connection import RawConnection
    from libp2p.peer.id import ID
    from libp2p.pubsub.gossipsub import GossipSub
    from libp2p.pubsub.pubsub import Pubsub
    from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
    from libp2p.security.noise.transport import Transport as NoiseTransport
    from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
    from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
    from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream
    from libp2p.tools.anyio_service import background_trio_service
    from libp2p.utils.connection_shutdown import is_expected_connection_shutdown
    from multiaddr import Multiaddr

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.mesh import MAX_FRAME_BYTES
from pinaivu_node.protocol.ids import PeerId

logger = logging.getLogger(__name__)

LIBP2P_VERSION: Final = "0.8.1"
GOSSIP_PROTOCOL: Final = TProtocol("/meshsub/1.1.0")
"""1.2 announces every message to every neighbour before sending it: twice the work for 1 KiB."""
_MAX_RPC_BYTES: Final = MAX_FRAME_BYTES + (64 << 10)
"""A gossip RPC carries the payload, its signature and the control messages beside it."""
_WINDOW: Final = 256 * 1024
"""Yamux's initial window; we never grow it, so that is what a stream buffers at most."""
_WRITE_LIMIT: Final = 10.0
"""Seconds for at most 64 KiB to leave; a link slower than 50 kbit/s cannot carry tokens anyway."""
_MAX_BUFFERED: Final = 32 << 20
"""Unread bytes of one connection over all its streams: 128 full windows."""

_MAX_COMPLAINTS: Final = 1024
"""Origins of failed handshakes remembered, so that each is logged once."""

PeerGate = Callable[[PeerId], bool]
Fault = Callable[[PeerId, str], None]


class Refused(Exception):
    """We want no connection with this peer."""


def silence() -> None:
    """Keep libp2p's log to itself: at INFO it tells every stream, at WARNING every lost peer."""
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    auto_connector_module.logger.setLevel(logging.CRITICAL)  # it sets its own
    # This module logs through `logging.debug`, which gives the root logger a handler on stderr.
    swarm_connection_module.logging = logging.getLogger("libp2p.connection")


def peer_of(thing: Any) -> PeerId:
    """The proven peer at the other end of a libp2p stream or connection."""
    return PeerId(str(thing.muxed_conn.peer_id))


# --- security and muxer ---------------------------------------------------------------------------


class _GatedNoise(NoiseTransport):  # type: ignore[misc] # untyped base
    """Noise that hangs up on a banned peer as soon as it has proven who it is."""

    gate: PeerGate

    async def secure_inbound(self, conn: Any) -> Any:
        return self._gated(await super().secure_inbound(conn))

    async def secure_outbound(self, conn: Any, peer_id: Any) -> Any:
        return self._gated(await super().secure_outbound(conn, peer_id))

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


def _transport_options(
    key_pair: Any, config: MeshConfig, *, gate: PeerGate, fault: Fault
) -> tuple[Any, Any]:
    """The only security and the only muxer there are.

    Our own Noise session and Yamux, same bytes on the wire, take the place of the two classes
    named here; nothing else in the mesh knows which they are.
    """
    noise = _GatedNoise(key_pair, noise_privkey=create_new_x25519_key_pair().private_key)
    noise.gate = gate
    muxer = _Muxer({YAMUX: _Yamux}, negotiate_timeout=int(config.dial_timeout))
    muxer.ping_interval, muxer.dead_after = config.ping_interval, config.dead_after
    muxer.fault = fault
    return {NOISE: noise}, muxer


# --- the host -------------------------------------------------------------------------------------


class _InboundGate:
    """Takes inbound connections through their handshake, a bounded number at a time."""

    def __init__(self, swarm: Any, max_half_open: int) -> None:
        self._swarm = swarm
        self._max_half_open = max_half_open
        self._half_open: dict[trio.CancelScope, None] = {}
        self._complained: dict[str, None] = {}

    async def handle(self, read_write_closer: Any, maddr: Any) -> None:
        """Serve one accepted socket until its connection is closed."""
        raw = RawConnection(read_write_closer, False)  # noqa: FBT003 - libp2p's signature
        muxed = await self._shake_hands(raw, maddr)
        if muxed is None:
            await raw.close()
        else:
            await muxed.event_closed.wait()

    async def _shake_hands(self, raw: Any, maddr: Any) -> Any:
        origin = (raw.get_remote_address() or ("?",))[0]
        with trio.CancelScope() as scope:
            self._half_open[scope] = None
            if len(self._half_open) > self._max_half_open:
                oldest = next(iter(self._half_open))
                del self._half_open[oldest]
                oldest.cancel()
            try:
                return await self._swarm.upgrade_inbound_raw_conn(raw, maddr)
            except Refused:
                return None
            except Exception as exc:  # noqa: BLE001 - whatever a handshake can do to us
                self._complain(origin, f"{exc}")
                return None
            finally:
                self._half_open.pop(scope, None)
        self._complain(origin, f"more than {self._max_half_open} handshakes at once")
        return None

    def _complain(self, origin: str, reason: str) -> None:
        if origin not in self._complained:
            logger.warning(
                "dropped a connection from %s, the first of its kind: %s", origin, reason
            )
            self._complained[origin] = None
            if len(self._complained) > _MAX_COMPLAINTS:
                del self._complained[next(iter(self._complained))]


class _NoAutoConnector(auto_connector_module.AutoConnector):  # type: ignore[misc] # untyped base
    """Dials nobody.  Told to keep at least 0 connections, the stock one starts 512 dials."""

    async def run_background_task(self, nursery: Any) -> None:
        """Nothing to run."""

    async def maybe_connect(self) -> None:
        """Nobody to connect to: we redial those we keep."""

    def record_disconnect(self, peer_id: Any) -> None:
        """Nothing to remember, and the stock memory is only cleared while dialling."""


def make_host(seed: bytes, config: MeshConfig, *, gate: PeerGate, fault: Fault) -> Any:
    """A host with the identity of this 32-byte seed; not yet running.

    `gate` says whether a peer that has proven its identity may connect; `fault` is told of peers
    that break the transport, and cuts them off.
    """
    swarm_module._HAPPY_EYEBALLS_DELAY = 0.0  # noqa: SLF001
    YamuxStream._auto_tune_and_send_window_update = _release_half_windows  # noqa: SLF001
    key_pair = create_new_key_pair(seed=seed)
    security, muxer = _transport_options(key_pair, config, gate=gate, fault=fault)
    host = new_host(
        key_pair=key_pair,
        sec_opt=security,
        muxer_opt={YAMUX: _Yamux},
        listen_addrs=[Multiaddr(address) for address in config.listen] or None,
        announce_addrs=[Multiaddr(address) for address in config.announce] or None,
        disable_identify_address_discovery=True,  # what strangers say of our address
        connection_config=ConnectionConfig(
            max_connections=config.max_connections,
            min_connections=0,
            low_watermark=0,
            high_watermark=config.max_connections,
            inbound_upgrade_timeout=config.dial_timeout,
            outbound_upgrade_timeout=config.dial_timeout,
            outbound_stream_protocol_negotiation_timeout=config.open_timeout,
            inbound_stream_protocol_negotiation_timeout=config.open_timeout,
        ),
    )
    swarm = host.get_network()
    swarm.set_resource_manager(None)
    swarm.auto_connector = _NoAutoConnector(swarm)
    swarm.retry_config = RetryConfig(max_retries=0)
    swarm.upgrader.muxer_multistream = muxer
    swarm._inbound_limiter = trio.CapacityLimiter(math.inf)  # noqa: SLF001
    inbound = _InboundGate(swarm, config.max_half_open)
    swarm._handle_inbound_connection = inbound.handle  # noqa: SLF001
    return host


@asynccontextmanager
async def run_host(
    host: Any, pubsub: Any, router: Any, listen: Sequence[str]
) -> AsyncIterator[None]:
    """Listen, and run host, pubsub and router while the block does."""
    async with (
        host.run([Multiaddr(address) for address in listen]),
        background_trio_service(pubsub),
        background_trio_service(router),
    ):
        await pubsub.wait_until_ready()
        try:
            yield
        finally:
            pubsub.seen_messages.stop()  # a thread that nobody else ends


async def dial(host: Any, location: str, peer: PeerId) -> None:
    """Connect, and prove that it is this peer."""
    await host.get_network().dial_addr(Multiaddr(location), ID.from_string(peer))


async def open_stream(host: Any, peer: PeerId, protocol: str) -> Any:
    """A stream of this protocol on the connection that there is."""
    return await host.new_stream(ID.from_string(peer), [TProtocol(protocol)])


async def dismiss(stream: Any) -> None:
    """Reset a stream that nobody serves any more; harmless on one that is closed."""
    with trio.CancelScope(shield=True):
        try:
            await stream.reset()
        except Exception:
            logger.debug("a stream could not be reset", exc_info=True)


async def close_connection(connection: Any) -> None:
    """Say goodbye and close; may hang with its peer, see `kill_connection`."""
    try:
        await connection.close()
    except Exception:
        logger.debug("a connection could not be closed", exc_info=True)


def forget_failure(host: Any, peer: PeerId) -> None:
    """Take a peer out of the minute for which the swarm refuses to dial it again."""
    host.get_network()._negative_peer_cache.evict(str(peer))  # noqa: SLF001


async def kill_connection(connection: Any) -> None:
    """Close the socket under a connection; its reader notices and cleans up."""
    try:
        await connection.muxed_conn.secured_conn.close()
    except Exception:
        logger.debug("a socket could not be closed", exc_info=True)


def guard_streams(
    host: Any, serve: Callable[[Any, Callable[[Any], Awaitable[None]]], Awaitable[None]]
) -> None:
    """Have `serve(stream, stock_handler)` called for every inbound stream of whatever protocol."""
    stock = host._swarm_stream_handler  # noqa: SLF001

    async def guarded(stream: Any) -> None:
        await serve(stream, stock)

    host.get_network().set_stream_handler(guarded)


def is_ordinary_end(exc: BaseException) -> bool:
    """Whether an exception only says that stream or connection are gone."""
    return bool(is_expected_connection_shutdown(exc))


# --- gossip ---------------------------------------------------------------------------------------


class SafePubsub(Pubsub):  # type: ignore[misc] # untyped base
    """Pubsub that no message can bring down, and that delivers without a queue of its own."""

    deliver: Callable[[Any], None]
    admits: PeerGate
    fault: Fault
    restart: Callable[[PeerId], None]

    async def push_msg(self, msg_forwarder: Any, msg: Any) -> None:
        """Check, deliver and forward one message; never raises for what is in it."""
        local = msg_forwarder == self.my_id
        if not local and not self.admits(PeerId(str(msg_forwarder))):
            return
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as exc:  # whatever a message can cause, in protobuf, keys or the router
            if local:
                raise
            self.fault(PeerId(str(msg_forwarder)), f"a gossip message that breaks us: {exc!r}")

    async def handle_sending_messages(self, peer_id: Any, stream: Any, queue: Any) -> None:
        """Write to one peer until that fails; the reader of its stream learns it too."""
        queue.max_message_size = _MAX_RPC_BYTES  # above it a message is dropped without a word
        try:
            # A topic subscribed to while the first greeting was being written is in neither the
            # greeting nor the queue.  Saying all again costs a hundred bytes.
            await self.write_msg(stream, self.get_hello_packet())
            await super().handle_sending_messages(peer_id, stream, queue)
        except Exception:
            logger.debug("gossip to a peer ended", exc_info=True)

    def _handle_dead_peer(self, peer_id: Any) -> None:
        """Forget a peer; and if it is connected still, begin anew with it.

        Its subscriptions are forgotten whichever of its streams or connections died, and it has no
        reason to announce them again: it would never hear from us.  So it goes when the old self of
        a restarted peer is found dead, or when a peer was too slow once.
        """
        super()._handle_dead_peer(peer_id)
        if self._peer_is_connected(peer_id):
            self.restart(PeerId(str(peer_id)))

    def notify_subscriptions(self, publish_message: Any) -> None:
        """Deliver straight to our inboxes: the stock queue holds 32 and drops the newest."""
        self.deliver(publish_message)


def make_pubsub(host: Any, config: MeshConfig) -> tuple[SafePubsub, Any]:
    """Pubsub and its router, to be run beside the host."""
    low, degree, high = (64, 256, 1024) if config.hub else (4, 6, 12)
    router = GossipSub(
        [GOSSIP_PROTOCOL],
        degree=degree,
        degree_low=low,
        degree_high=high,
        heartbeat_initial_delay=0.1,
        heartbeat_interval=1,
        adaptive_gossip_enabled=False,  # its "health" lengthens the heartbeat to a minute
        spam_protection_enabled=False,  # drops above 10 messages a second, ours included
        eclipse_protection_enabled=False,  # wants neighbours of many IP networks
    )
    pubsub = SafePubsub(host, router, strict_signing=True, max_inbound_rpc_size=_MAX_RPC_BYTES)
    pubsub.counter = time.time_ns()
    return pubsub, router


def publisher_of(message: Any) -> PeerId:
    """Who signed this gossip message."""
    return PeerId(str(ID(message.from_id)))
