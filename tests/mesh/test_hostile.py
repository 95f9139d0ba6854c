"""A listening port and what is thrown at it: the process lives, stays small, and serves others."""

from __future__ import annotations

import os

import pytest
import trio

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh

ECHO = "/pinaivu/echo/1"
MEBIBYTE = 1 << 20

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def victim(start_peer):
    return start_peer("victim")


async def assert_served(victim) -> None:
    """A newcomer connects and is answered, quickly."""
    assert victim.is_alive, victim.log
    with trio.fail_after(5):
        async with open_libp2p_mesh(MeshConfig(listen=()), seed=os.urandom(32)) as honest:
            await honest.dial(victim.address)
            stream = await honest.open(victim.peer_id, ECHO)
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
    assert victim.is_alive, victim.log


@pytest.fixture(autouse=True)
def check_memory(victim):
    before = victim.resident_bytes
    yield
    assert victim.resident_bytes - before < 100 * MEBIBYTE


async def test_a_megabyte_of_random_bytes(victim, attacks):
    await attacks.random_megabyte(victim.address)
    await assert_served(victim)


async def test_garbage_at_every_stage_of_the_handshake(victim, attacks):
    await attacks.garbage_at_every_stage(victim.address)
    await assert_served(victim)


async def test_three_hundred_silent_connections_keep_nobody_out(victim, attacks):
    async with attacks.half_open_connections(victim.address, 300):
        await assert_served(victim)
    await assert_served(victim)


async def test_a_gibibyte_length_prefix(victim, attacks):
    complaints = victim.log.count("dropped")
    assert await attacks.gigabyte_length_prefix(victim.address, ECHO)
    assert victim.log.count("dropped") == complaints + 1
    await assert_served(victim)


async def test_a_frame_of_unknown_type(victim, attacks):
    assert await attacks.garbage_frames(victim.address, ECHO)
    await assert_served(victim)


async def test_five_thousand_streams_of_one_peer(victim, attacks):
    complaints = victim.log.count("dropped")
    assert await attacks.five_thousand_streams(victim.address)
    assert victim.log.count("dropped") == complaints + 1
    await assert_served(victim)


@pytest.mark.live
async def test_a_peer_that_never_reads(victim, attacks):
    complaints = victim.log.count("dropped")
    frame = b"\x81\x80\x04\x00" + bytes(65536)
    assert await attacks.never_read(victim.address, ECHO, frame)
    assert victim.log.count("dropped") == complaints + 1
    await assert_served(victim)


async def test_a_peer_that_ignores_flow_control(victim, attacks):
    complaints = victim.log.count("dropped")
    assert await attacks.ignore_flow_control(victim.address, ECHO, 200)
    assert victim.log.count("dropped") == complaints + 1
    await assert_served(victim)


async def test_oversized_gossip(victim, attacks):
    await attacks.oversized_gossip(victim.address)
    await assert_served(victim)


@pytest.mark.parametrize("attack", ["garbage_gossip", "garbage_gossip_messages"])
async def test_garbage_gossip(victim, attacks, attack):
    complaints = victim.log.count("dropped")
    assert await getattr(attacks, attack)(victim.address)
    assert victim.log.count("dropped") == complaints + 1
    await assert_served(victim)


async def test_garbage_to_the_protocols_of_libp2p(victim, attacks):
    await attacks.garbage_to_stock_protocols(victim.address)
    await assert_served(victim)


async def test_garbage_in_yamux_frames(victim, attacks):
    await attacks.garbage_yamux(victim.address)
    await assert_served(victim)


@pytest.mark.live
async def test_three_hundred_connections_one_after_another(victim, attacks):
    """The stock limiter refuses for ever after 250."""
    await attacks.connections_one_after_another(victim.address, 300)
    await assert_served(victim)


@pytest.mark.parametrize("protocol", [b"/plaintext/2.0.0", b"/tls/1.0.0", b"/secio/1.0.0"])
async def test_nobody_says_who_he_is_without_proof(victim, attacks, protocol):
    answer = await attacks.propose(victim.address, protocol)
    assert answer.endswith(b"\x03na\n")
    assert protocol not in answer


@pytest.mark.live
async def test_a_peer_that_connects_a_thousand_times_is_refused_and_nobody_else(victim, attacks):
    assert await attacks.reconnects(victim.address, 1000) < 100
    assert "reconnecting, again and again" in victim.log
    await assert_served(victim)


async def test_nothing_of_all_this_left_a_traceback(victim):
    assert "Traceback" not in victim.log
    ours = "WARNING:pinaivu_node.mesh.libp2p"
    assert all(line.startswith(ours) for line in victim.log.splitlines())
