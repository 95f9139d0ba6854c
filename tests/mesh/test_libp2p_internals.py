"""Fails when an upgrade of libp2p moves something that `mesh/libp2p/` reaches for."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import os

import pytest
from nacl.signing import SigningKey

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import gossip, transport
from pinaivu_node.mesh.libp2p import host as libp2p_host
from pinaivu_node.protocol.ids import peer_id_of


@pytest.fixture
def host():
    return libp2p_host.make_host(
        os.urandom(32),
        MeshConfig(),
        gate=lambda _peer: True,
        fault=lambda _peer, _reason: None,
    )


def test_the_version_is_the_one_that_was_read():
    assert importlib.metadata.version("libp2p") == libp2p_host.LIBP2P_VERSION


async def test_only_noise_and_yamux_are_offered_and_accepted(host):
    upgrader = host.get_network().upgrader
    assert list(upgrader.security_multistream.transports) == ["/noise"]
    assert list(upgrader.muxer_multistream.transports) == ["/yamux/1.0.0"]


async def test_the_identity_is_that_of_the_signing_key():
    seed = bytes(range(32))
    host = libp2p_host.make_host(
        seed, MeshConfig(), gate=lambda _peer: True, fault=lambda _peer, _reason: None
    )
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
    # The listener looks the handler up on the instance; bound early, ours would never run.
    assert "self._handle_inbound_connection(" in inspect.getsource(type(stock).listen)


def test_everything_overridden_in_yamux_is_called_by_it():
    source = inspect.getsource(transport.Yamux)
    for call in (
        "self._measure_rtt_loop",
        "self._read_data_body(",
        "self._write_frame(",
        "self._cleanup_on_error()",
        "self._ping_event.set()",
        "except trio.TooSlowError:",
        "self._write_lock",
        "self.stream_buffers",
        "self.event_closed",
    ):
        assert call in source, call
    stream = inspect.getsource(transport.YamuxStream)
    for name in (
        "await self._auto_tune_and_send_window_update(bytes_read=",
        "self._pending_recv_release",
        "self.recv_window",
        "self.send_window",
        "self.closed",
        "async def send_window_update(self, increment: int",
    ):
        assert name in stream, name


def test_everything_overridden_in_pubsub_is_called_by_it():
    source = inspect.getsource(gossip.Pubsub)
    for call in (
        "self.push_msg",
        "self.handle_sending_messages, peer_id, stream, queue",
        "self.notify_subscriptions(",
        "self._handle_dead_peer(",
        "self._peer_is_connected(",
        "self.get_hello_packet()",
        "self.write_msg(",
        "queue.max_message_size",
        "self.counter += 1",
        "self.seen_messages",
    ):
        assert call in source, call


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
