from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.mesh.backoff import Backoff
from pinaivu_node.mesh.peers import PeerBook
from pinaivu_node.protocol.ids import PeerId

ONE, TWO = PeerId("one"), PeerId("two")


def book() -> PeerBook:
    return PeerBook(max_held=1000, gossip_per_second=10)


def test_a_ban_ends_when_it_says_and_a_shorter_one_does_not_shorten_it():
    peers = book()
    peers.ban(ONE, until=10.0)
    peers.ban(ONE, until=5.0)
    assert peers.is_banned(ONE, now=9.9)
    assert not peers.is_banned(TWO, now=0.0)
    assert not peers.is_banned(ONE, now=10.0)
    assert not peers.is_banned(ONE, now=9.0)  # it was forgotten


def test_of_too_many_bans_the_oldest_is_forgotten():
    peers = book()
    for number in range(10_001):
        peers.ban(PeerId(f"peer {number}"), until=100.0)
    assert not peers.is_banned(PeerId("peer 0"), now=0.0)
    assert peers.is_banned(PeerId("peer 1"), now=0.0)


def test_a_peer_is_complained_of_once():
    peers = book()
    assert [peers.is_first_complaint(ONE), peers.is_first_complaint(ONE)] == [True, False]
    assert peers.is_first_complaint(TWO)


def test_what_is_held_for_a_peer_is_bounded_and_given_back():
    peers = book()
    assert peers.hold(ONE, 600)
    assert not peers.hold(ONE, 600)
    assert peers.hold(TWO, 600)
    peers.release(ONE, 600)
    assert peers.hold(ONE, 400)


def test_streams_are_counted_per_peer():
    peers = book()
    assert [peers.open_stream(ONE), peers.open_stream(ONE), peers.open_stream(TWO)] == [1, 2, 1]
    peers.close_stream(ONE)
    assert peers.open_stream(ONE) == 2


def test_gossip_is_admitted_at_its_rate_after_a_burst():
    peers = book()
    assert sum(peers.admits_gossip(ONE, now=0.0) for _ in range(20)) == 10
    assert sum(peers.admits_gossip(ONE, now=0.5) for _ in range(20)) == 5
    assert sum(peers.admits_gossip(ONE, now=100.0) for _ in range(20)) == 10
    assert peers.admits_gossip(TWO, now=100.0)


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_a_delay_is_never_longer_than_the_ceiling_nor_shorter_than_half_the_first(failures, dice):
    assert 0.05 <= Backoff().delay(failures, dice=dice) <= 2.0


def test_delays_double():
    delays = [Backoff().delay(failures, dice=0.0) for failures in range(1, 8)]
    assert delays == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
