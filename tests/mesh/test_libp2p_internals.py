"""Fails when an upgrade of libp2p moves something that `mesh/libp2p/` reaches for."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import os

import noise.connection
import noise.state
import pytest
import trio.testing
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession
from nacl.signing import SigningKey

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import channel, gossip
from pinaivu_node.mesh.libp2p import host as libp2p_host
from pinaivu_node.mesh.libp2p.muxed_stream import MuxedStream
from pinaivu_node.mesh.libp2p.muxer import MuxedConnection
from pinaivu_node.protocol.ids import peer_id_of


@pytest.fixture
def host():
    return libp2p_host.make_host(
        os.urandom(32),
        MeshConfig(),
        gate=lambda _peer: True,
        fault=lambda *_: None,
    )


def test_the_version_is_the_one_that_was_read():
    assert importlib.metadata.version("libp2p") == libp2p_host.LIBP2P_VERSION


async def test_only_noise_and_yamux_are_offered_and_accepted(host):
    upgrader = host.get_network().upgrader
    assert list(upgrader.security_multistream.transports) == ["/noise"]
    assert list(upgrader.muxer_multistream.transports) == ["/yamux/1.0.0"]


async def test_the_identity_is_that_of_the_signing_key():
    seed = bytes(range(32))
    host = libp2p_host.make_host(seed, MeshConfig(), gate=lambda _peer: True, fault=lambda *_: None)
    assert str(host.get_id()) == peer_id_of(bytes(SigningKey(seed).verify_key))


async def test_everything_replaced_in_the_swarm_is_there_to_replace(host):
    stock = libp2p_host.new_host().get_network()
    for name in (
        "_inbound_limiter",
        "_handle_inbound_connection",
        "_negative_peer_cache",
        "auto_connector",
        "retry_config",
        "set_resource_manager",
        "common_stream_handler",
        "upgrade_inbound_raw_conn",
        "dial_addr",
        "register_notifee",
    ):
        assert hasattr(stock, name), name
    assert hasattr(libp2p_host.swarm_module, "_HAPPY_EYEBALLS_DELAY")
    assert hasattr(host, "_swarm_stream_handler")
    assert callable(stock._negative_peer_cache.evict)
    upgrader = inspect.getsource(type(stock.upgrader))
    assert "await self.security_multistream.secure_outbound(" in upgrader
    assert "await self.security_multistream.secure_inbound(raw_conn)" in upgrader
    assert "await self.muxer_multistream.new_conn(conn, peer_id)" in upgrader
    # The listener looks the handler up on the instance; bound early, ours would never run.
    assert "self._handle_inbound_connection(" in inspect.getsource(type(stock).listen)


def test_the_keys_of_a_stock_handshake_are_where_our_session_looks_for_them():
    source = inspect.getsource(SecureSession)
    for name in ("local_private_key", "remote_permanent_pubkey", "self.conn = conn"):
        assert name in source, name
    assert "self.noise_state.encrypt(" in inspect.getsource(NoiseTransportReadWriter)
    state = inspect.getsource(noise.state.CipherState)
    assert "self.k = key" in state
    assert "self.n = self.n + 1" in state
    connection = inspect.getsource(noise.connection.NoiseConnection)
    assert "self.noise_protocol.cipher_state_encrypt" in connection
    assert "self.noise_protocol.cipher_state_decrypt" in connection


async def test_a_tcp_connection_of_libp2p_ends_in_a_socket_that_we_find():
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    stream = await trio.testing.open_stream_to_socket_listener(listener)
    raw = RawConnection(TrioTCPStream(stream), initiator=True)
    assert isinstance(channel.channel_of(raw), channel.SocketChannel)
    assert isinstance(channel.channel_of(object()), channel.LayeredChannel)
    await raw.close()
    await listener.aclose()


def test_the_swarm_asks_of_a_muxed_connection_what_ours_has():
    assert MuxedConnection.__abstractmethods__ == frozenset()
    assert MuxedStream.__abstractmethods__ == frozenset()
    swarm_connection = inspect.getsource(libp2p_host.swarm_connection_module)
    for use in (
        'setattr(muxed_conn, "on_close", self._on_muxed_conn_closed)',
        "await self.muxed_conn.accept_stream()",
        "except MuxedConnUnavailable",
        "await self.muxed_conn.open_stream()",
    ):
        assert use in swarm_connection, use
    assert "run_task(muxed_conn.start)" in inspect.getsource(libp2p_host.swarm_module)


def test_everything_overridden_in_pubsub_is_called_by_it():
    source = inspect.getsource(gossip.Pubsub)
    for call in (
        "self.push_msg",
        "self.handle_sending_messages, peer_id, stream, queue",
        "self.notify_subscriptions(",
        "self.handle_subscription(",
        "self._handle_dead_peer(",
        "self._peer_is_connected(",
        "self.get_hello_packet()",
        "self.write_msg(",
        "queue.max_message_size",
        "self.counter += 1",
        "self.seen_messages",
    ):
        assert call in source, call


def test_everything_overridden_in_the_router_is_called_by_it():
    source = inspect.getsource(gossip.GossipSub)
    for call in ("self._get_peers_to_send(", "msg_forwarder=msg_forwarder", "self.degree_high"):
        assert call in source, call
    publishing = inspect.getsource(gossip.Pubsub.publish)
    assert "self.push_msg(self.host.get_id(), msg)" in publishing or "self.my_id" in publishing


async def test_gossip_sequence_numbers_grow_over_a_restart(host):
    first, _ = gossip.make_pubsub(host, MeshConfig())
    for _ in range(300):
        first._next_seqno()
    again, _ = gossip.make_pubsub(host, MeshConfig())
    assert again._next_seqno() > first._next_seqno()
    for pubsub in (first, again):
        pubsub.seen_messages.stop()


async def test_dials_are_not_delayed_and_inbound_connections_not_counted_for_ever(host):
    assert libp2p_host.swarm_module._HAPPY_EYEBALLS_DELAY == 0
    assert host.get_network()._inbound_limiter.total_tokens == float("inf")
    assert host.get_network()._resource_manager is None


def test_libp2p_is_silenced_without_touching_the_root_logger():
    root = logging.getLogger()
    before = list(root.handlers)
    libp2p_host.silence()
    libp2p_host.swarm_connection_module.logging.debug(
        "through the module that uses the root logger"
    )
    assert root.handlers == before
    assert not logging.getLogger("libp2p.network.swarm").isEnabledFor(logging.WARNING)
