from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.mesh.conduct import (
    BANNED_AT,
    FIRST_BAN,
    HALF_LIFE,
    LONGEST_BAN,
    Conduct,
    Offence,
)
from pinaivu_node.protocol.ids import PeerId

ONE, TWO = PeerId("one"), PeerId("two")


def test_the_third_breach_in_a_row_is_a_ban_and_the_other_peer_is_not_touched():
    conduct = Conduct()
    assert conduct.offend(ONE, Offence.PROTOCOL, now=0) is None
    assert conduct.offend(ONE, Offence.STREAM_FLOOD, now=1) is None
    assert conduct.offend(ONE, Offence.PROTOCOL, now=2) == FIRST_BAN
    assert conduct.weight(TWO, now=2) == 0


def test_offences_are_forgiven():
    conduct = Conduct()
    conduct.offend(ONE, Offence.PROTOCOL, now=0)
    before = conduct.weight(ONE, now=0)
    assert conduct.weight(ONE, now=HALF_LIFE) == before / 2
    for hour in range(1, 50):
        assert conduct.offend(ONE, Offence.PROTOCOL, now=3600 * hour) is None


def test_bans_grow_up_to_a_bound():
    conduct = Conduct()
    bans = []
    for number in range(300):
        ban = conduct.offend(ONE, Offence.PROTOCOL, now=number)
        bans += [ban] if ban else []
    assert bans[:3] == [FIRST_BAN, 2 * FIRST_BAN, 4 * FIRST_BAN]
    assert bans == sorted(bans)
    assert bans[-1] == LONGEST_BAN


def test_bad_luck_is_never_a_ban():
    conduct = Conduct()
    assert all(conduct.offend(ONE, Offence.STALLING, now=0) is None for _ in range(10_000))


def test_gossip_beyond_the_rate_is_a_ban_in_the_end():
    conduct = Conduct()
    bans = [conduct.offend(ONE, Offence.GOSSIP_FLOOD, now=0) for _ in range(2001)]
    assert sum(ban is not None for ban in bans) == 1


def test_a_peer_may_come_back_often_but_not_all_the_time():
    conduct = Conduct()
    assert sum(conduct.admits_connection(ONE, now=0) for _ in range(1000)) == 60
    assert conduct.admits_connection(ONE, now=2)
    assert not conduct.admits_connection(ONE, now=2)
    assert conduct.admits_connection(TWO, now=2)


def test_of_too_many_the_oldest_is_forgotten():
    conduct = Conduct()
    conduct.offend(ONE, Offence.PROTOCOL, now=0)
    conduct.offend(TWO, Offence.PROTOCOL, now=0)
    for number in range(9_999):
        conduct.offend(PeerId(str(number)), Offence.PROTOCOL, now=0)
    assert conduct.weight(ONE, now=0) == 0
    assert conduct.weight(TWO, now=0) > 0


@given(st.lists(st.tuples(st.sampled_from(Offence), st.floats(0, 1e6)), max_size=60))
def test_no_history_weighs_more_than_a_ban_or_less_than_nothing(history):
    conduct, now = Conduct(), 0.0
    for offence, pause in history:
        now += pause
        ban = conduct.offend(ONE, offence, now=now)
        assert ban is None or FIRST_BAN <= ban <= LONGEST_BAN
        assert 0 <= conduct.weight(ONE, now=now) < BANNED_AT
