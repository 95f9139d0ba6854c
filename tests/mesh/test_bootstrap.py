"""Finding a coordinator in a list of addresses."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from pinaivu_node.mesh.bootstrap import by_peer, join_coordinator
from pinaivu_node.mesh.memory import MemoryNetwork
from pinaivu_node.mesh.mesh import PeerUnreachable

GONE = "/memory/1/p2p/12D3KooWRdFFg3yTbTsDq5Z1yCvCWbqznEFro9jeVivo7rkayJ4D"


async def test_the_first_that_answers_is_joined(autojump_clock: trio.testing.MockClock) -> None:
    async with (
        MemoryNetwork(seed=1) as network,
        network.join(b"1" * 32) as one,
        network.join(b"2" * 32) as two,
        network.join(b"3" * 32) as peer,
    ):
        found = await join_coordinator(peer, (GONE, two.addresses[0], one.addresses[0]))
        assert found == two.peer_id
        assert peer.peers() == {two.peer_id}


async def test_one_alone_need_not_be_there(autojump_clock: trio.testing.MockClock) -> None:
    async with MemoryNetwork(seed=1) as network, network.join(b"3" * 32) as peer:
        with trio.fail_after(1):
            assert await join_coordinator(peer, (GONE, GONE)) == GONE.rpartition("/")[2]


async def test_it_goes_on_until_one_is_there(autojump_clock: trio.testing.MockClock) -> None:
    async with MemoryNetwork(seed=1) as network:
        async with network.join(b"1" * 32) as late:
            address = late.addresses[0]
        async with network.join(b"3" * 32) as peer:
            with trio.move_on_after(60) as scope:
                await join_coordinator(peer, (GONE, address))
            assert scope.cancelled_caught
            async with network.join(b"1" * 32) as late:
                assert await join_coordinator(peer, (GONE, late.addresses[0])) == late.peer_id


async def test_it_stays_with_the_one_it_found(autojump_clock: trio.testing.MockClock) -> None:
    async with (
        MemoryNetwork(seed=1) as network,
        network.join(b"1" * 32) as one,
        network.join(b"2" * 32) as two,
        network.join(b"3" * 32) as peer,
    ):
        await join_coordinator(peer, (one.addresses[0], two.addresses[0]))
        await peer.disconnect(one.peer_id)
        await trio.sleep(10)
        assert peer.peers() == {one.peer_id}


def test_what_can_never_be_dialled_is_named() -> None:
    with pytest.raises(PeerUnreachable, match="not a multiaddr"):
        by_peer(("203.0.113.7:4001",))


def test_the_ways_to_one_coordinator_are_gathered() -> None:
    other = GONE.replace("/memory/1", "/memory/2")
    assert list(by_peer((GONE, other)).values()) == [[GONE, other]]
