from __future__ import annotations

import pytest
from market_town import MODEL, START, make_offer, request_id, signer_of

from pinaivu_node.coordinator.roster import Market
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.market import (
    MAX_PEER_LIST,
    Announce,
    Heartbeat,
    Hello,
    ModelLoad,
    Role,
)
from pinaivu_node.protocol.wire import MAX_MESSAGE_BYTES, encode

ONE, TWO, GATEWAY = (signer_of(name).peer_id for name in ("one", "two", "gateway"))


def hello(role=Role.PROVIDER, addresses=("/ip4/10.0.0.1/tcp/1",)) -> Hello:
    return Hello(role=role, addresses=addresses, software="test/1")


@pytest.fixture
def market() -> Market:
    market = Market()
    market.enter(ONE, hello(), now=START)
    market.enter(GATEWAY, hello(Role.GATEWAY), now=START)
    market.announce_untrusted(ONE, Announce(models=(make_offer(capacity=2),)))
    return market


def test_a_provider_is_listed_under_its_models_until_it_leaves(market):
    assert set(market.sellers(MODEL)) == {ONE}
    assert market.sells(ONE, MODEL)
    assert market.leave(ONE)
    assert not market.leave(ONE)
    assert not market.sells(ONE, MODEL)
    assert not market.is_announced(MODEL)


def test_an_announce_replaces_the_one_before(market):
    market.announce_untrusted(ONE, Announce(models=(make_offer("other"),)))
    assert not market.is_announced(MODEL)
    assert market.is_announced("other")


def test_three_missed_heartbeats_make_a_peer_silent(market):
    market.hear(ONE, START + 1000)
    assert market.silent(now=START + 3000, heartbeat_ms=1000) == []
    assert market.silent(now=START + 3001, heartbeat_ms=1000) == [GATEWAY]
    assert set(market.silent(now=START + 4001, heartbeat_ms=1000)) == {ONE, GATEWAY}


def test_a_draining_provider_is_known_but_sells_nothing(market):
    market.drain_untrusted(ONE, draining=True)
    assert market.is_announced(MODEL)
    assert market.sellers(MODEL) == {}
    assert market.roster_for(Role.GATEWAY).entries[0].models == ()
    market.drain_untrusted(ONE, draining=False)
    assert set(market.sellers(MODEL)) == {ONE}


def load(running: int) -> Heartbeat:
    return Heartbeat(sequence=1, loads=(ModelLoad(model=MODEL, running=running, queued=0),))


def test_what_a_provider_reports_and_what_was_given_away_both_fill_it(market):
    assert not market.is_known_full(ONE, MODEL, START)
    market.report_load(ONE, load(2))
    assert market.is_known_full(ONE, MODEL, START)
    assert not market.is_given_away(ONE, MODEL, START)  # its own word may be a heartbeat old
    market.report_load(ONE, load(0))
    for number in (1, 2):
        market.reserve(ONE, MODEL, request_id(number), START + 100)
    assert market.is_given_away(ONE, MODEL, START + 99)
    assert not market.is_given_away(ONE, MODEL, START + 100)


def test_a_finished_job_frees_its_place_at_once(market):
    market.report_load(ONE, load(2))
    market.release(ONE, MODEL, request_id(), ran=True)
    assert not market.is_known_full(ONE, MODEL, START)
    market.reserve(ONE, MODEL, request_id(1), START + 100)
    market.reserve(ONE, MODEL, request_id(2), START + 100)
    market.release(ONE, MODEL, request_id(1), ran=False)
    assert not market.is_given_away(ONE, MODEL, START)


def test_who_is_not_there_is_full(market):
    assert market.is_known_full(TWO, MODEL, START)
    assert market.is_given_away(TWO, MODEL, START)
    market.release(TWO, MODEL, request_id(), ran=True)
    market.report_load(TWO, load(1))


def test_gateways_are_told_of_providers_and_providers_of_gateways(market):
    [provider] = market.roster_for(Role.GATEWAY).entries
    [gateway] = market.roster_for(Role.PROVIDER).entries
    assert (provider.peer, [offer.model for offer in provider.models]) == (ONE, [MODEL])
    assert (gateway.peer, gateway.models) == (GATEWAY, ())


def test_a_roster_fits_one_frame_however_many_there_are(market):
    models = tuple(make_offer(f"model-{n}") for n in range(64))
    for number in range(200):
        peer = signer_of(f"crowd {number}").peer_id
        market.enter(peer, hello(addresses=("/ip4/10.0.0.1/tcp/1" * 10,) * 8), now=START)
        market.announce_untrusted(peer, Announce(models=models))
    roster = market.roster_for(Role.GATEWAY)
    assert len(encode(roster)) < MAX_MESSAGE_BYTES
    assert 0 < len(roster.entries) <= MAX_PEER_LIST
    assert market.left_out == 201 - len(roster.entries)


def test_only_providers_announce_and_nobody_changes_role(market):
    for said in (
        lambda: market.announce_untrusted(GATEWAY, Announce(models=())),
        lambda: market.drain_untrusted(GATEWAY, draining=True),
        lambda: market.announce_untrusted(TWO, Announce(models=())),
        lambda: market.announce_untrusted(ONE, Announce(models=(make_offer(), make_offer()))),
        lambda: market.enter(ONE, hello(Role.GATEWAY), now=START),
    ):
        with pytest.raises(RemoteProtocolError):
            said()
    assert market.sells(ONE, MODEL)
