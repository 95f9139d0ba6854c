"""A py-libp2p host that is safe to expose, and what is asked of it.

See the package for what is changed and why.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import libp2p.network.auto_connector as auto_connector_module
import libp2p.network.connection.swarm_connection as swarm_connection_module
import libp2p.network.swarm as swarm_module
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.tcp.tcp import TCP
from libp2p.utils.connection_shutdown import is_expected_connection_shutdown
from multiaddr import Multiaddr

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p.listening import spelled_out
from pinaivu_node.mesh.libp2p.muxer import Fault, MuxedConnection
from pinaivu_node.mesh.libp2p.proxy import HttpProxy
from pinaivu_node.mesh.libp2p.secure import PeerGate, Refused
from pinaivu_node.mesh.libp2p.transport import transport_options
from pinaivu_node.mesh.libp2p.websocket import WebSocketTransport, server_context
from pinaivu_node.protocol.ids import PeerId

logger = logging.getLogger(__name__)

LIBP2P_VERSION: Final = "0.8.1"
_MAX_COMPLAINTS: Final = 1024
"""Origins of failed handshakes remembered, so that each is logged once."""


def silence() -> None:
    """Keep libp2p's log to itself: at INFO it tells every stream, at WARNING every lost peer."""
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    auto_connector_module.logger.setLevel(logging.CRITICAL)  # it sets its own
    # This module logs through `logging.debug`, which gives the root logger a handler on stderr.
    swarm_connection_module.logging = logging.getLogger("libp2p.connection")


def peer_of(thing: Any) -> PeerId:
    """The proven peer at the other end of a libp2p stream or connection."""
    return PeerId(str(thing.muxed_conn.peer_id))


class _InboundGate:
    """Takes inbound connections through their handshake, a bounded number at a time."""

    def __init__(self, swarm: Any, max_half_open: int, failed: Callable[[], None]) -> None:
        self._swarm = swarm
        self._failed = failed
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
                self._failed()
                self._complain(origin, f"{exc}")
                return None
            finally:
                self._half_open.pop(scope, None)
        self._failed()
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


def make_host(
    seed: bytes,
    config: MeshConfig,
    *,
    gate: PeerGate,
    fault: Fault,
    failed: Callable[[], None] = lambda: None,
) -> Any:
    """A host with the identity of this 32-byte seed; not yet running.

    `gate` says whether a peer that has proven its identity may connect; `fault` is told of peers
    that break the transport, and cuts them off; `failed` of each handshake that comes to nothing.
    MeshError if the certificate cannot be used.
    """
    swarm_module._HAPPY_EYEBALLS_DELAY = 0.0  # noqa: SLF001
    key_pair = create_new_key_pair(seed=seed)
    # Full, libp2p would refuse whoever comes; we take him, and let go of who is least wanted.
    most = config.max_connections + config.max_half_open
    security, muxer = transport_options(key_pair, config, gate=gate, fault=fault)
    host = new_host(
        key_pair=key_pair,
        sec_opt=security.transports,
        muxer_opt={YAMUX: MuxedConnection},
        transports=[TCP(), _websockets(config)],
        announce_addrs=[Multiaddr(address) for address in config.announce] or None,
        disable_identify_address_discovery=True,  # what strangers say of our address
        connection_config=ConnectionConfig(
            max_connections=most,
            min_connections=0,
            low_watermark=0,
            high_watermark=most,
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
    swarm.upgrader.security_multistream = security
    swarm.upgrader.muxer_multistream = muxer
    swarm._inbound_limiter = trio.CapacityLimiter(math.inf)  # noqa: SLF001
    inbound = _InboundGate(swarm, config.max_half_open, failed)
    swarm._handle_inbound_connection = inbound.handle  # noqa: SLF001
    return host


def _websockets(config: MeshConfig) -> WebSocketTransport:
    certificate = None
    if config.tls_certificate is not None:
        certificate = server_context(config.tls_certificate, config.tls_key)
    return WebSocketTransport(certificate, HttpProxy(config.proxy) if config.proxy else None)


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
        # Asked for with every gossip message sent, and a quarter of its cost; it changes no more.
        addresses = [
            Multiaddr(each) for known in host.get_addrs() for each in spelled_out(f"{known}")
        ]
        host.get_addrs = lambda: list(addresses)
        await pubsub.wait_until_ready()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.get_network().upgrader.muxer_multistream.pulse.run)
            try:
                yield
            finally:
                pubsub.seen_messages.stop()  # a thread that nobody else ends
                nursery.cancel_scope.cancel()


async def dial(host: Any, location: str, peer: PeerId) -> None:
    """Connect, and prove that it is this peer."""
    await host.get_network().dial_addr(Multiaddr(location), ID.from_string(peer))


async def open_stream(host: Any, peer: PeerId, protocol: str) -> Any:
    """A stream of this protocol on the connection that there is."""
    return await host.new_stream(ID.from_string(peer), [TProtocol(protocol)])


async def part_with(stream: Any, *, patience: float) -> None:
    """Say FIN on a stream whose handler is done, and let the peer say it too, for a while.

    A reset at once would overtake what the handler said last: js-libp2p forgets then what it has
    not read yet.
    """
    try:
        await stream.close()
        with trio.move_on_after(patience):
            await stream.muxed_stream.wait_closed()
    except Exception:
        logger.debug("a stream could not be closed", exc_info=True)


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
