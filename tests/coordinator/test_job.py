from __future__ import annotations

import itertools

import pytest
from contracts import GATEWAY, STANDBY, STRANGER, WINNER, deliver, make_job, prove
from market_town import START, USAGE, make_delivery, make_report

from pinaivu_node.coordinator.config import DEFAULT_POLICY
from pinaivu_node.coordinator.job import TRANSITIONS, JobEvent, JobState, after, hold_for
from pinaivu_node.protocol.errors import LocalProtocolError, PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import digest_of
from pinaivu_node.protocol.market import SegmentOutcome
from pinaivu_node.protocol.money import ZERO_USAGE, PriceList

GRACE = 10_000
DEADLINE = START + 60_000


def settle_at(job, *, here=True):
    return job.settle_at(grace_ms=GRACE, gateway_is_here=here)


def delivery_of(*reports):
    return make_delivery(GATEWAY.peer_id, *reports)


def test_every_state_is_in_the_table_and_only_its_events_are_allowed():
    assert set(TRANSITIONS) == set(JobState)
    for state, event in itertools.product(JobState, JobEvent):
        if event in TRANSITIONS[state]:
            assert after(state, event) is TRANSITIONS[state][event]
        else:
            with pytest.raises(LocalProtocolError):
                after(state, event)


def test_a_job_ends_once():
    job = make_job()
    job.settle()
    with pytest.raises(LocalProtocolError):
        job.settle()
    with pytest.raises(LocalProtocolError):
        prove(job, WINNER, USAGE)
    assert job.proofs == {}


def test_proof_and_delivery_settle_it_at_once_in_either_order():
    for steps in itertools.permutations((0, 1)):
        job = make_job()
        for step in steps:
            assert not job.is_matched()
            if step:
                assert prove(job, WINNER, USAGE)
            else:
                assert deliver(job, delivery_of(make_report(WINNER.peer_id)))
        assert job.state is JobState.DELIVERED
        assert settle_at(job) == START + 100


def test_a_delivery_without_any_output_waits_for_no_proof():
    job = make_job()
    failed = make_report(WINNER.peer_id, usage=ZERO_USAGE, outcome=SegmentOutcome.REFUSED)
    deliver(job, delivery_of(failed))
    assert job.is_matched()


def test_a_resumed_job_waits_for_the_proof_of_each_who_delivered():
    job = make_job()
    deliver(job, delivery_of(make_report(WINNER.peer_id), make_report(STANDBY.peer_id)))
    prove(job, STANDBY, USAGE)
    assert not job.is_matched()
    prove(job, WINNER, USAGE)
    assert job.is_matched()


def test_when_a_statement_is_missing_the_job_waits_so_long():
    job = make_job()
    assert settle_at(job) == settle_at(job, here=False) == DEADLINE + GRACE
    prove(job, WINNER, USAGE)
    assert settle_at(job) == DEADLINE + GRACE  # the gateway may still be at work with a standby
    assert settle_at(job, here=False) == START + 100 + GRACE
    job = make_job()
    deliver(job, delivery_of(make_report(WINNER.peer_id)))
    assert settle_at(job) == START + 100 + GRACE


def test_saying_it_again_changes_nothing():
    job = make_job()
    assert prove(job, WINNER, USAGE)
    assert not prove(job, WINNER, ZERO_USAGE)
    assert job.proofs[WINNER.peer_id].message.usage == USAGE
    assert deliver(job, delivery_of(make_report(WINNER.peer_id)))
    assert not deliver(job, delivery_of())
    assert len(job.delivery.message.segments) == 1


FOREIGN_PROOFS = {
    "by somebody without a token": (STRANGER, {}),
    "in another's name": (WINNER, {"provider": STANDBY.peer_id}),
    "for another gateway": (WINNER, {"gateway": STRANGER.peer_id}),
    "for another token": (WINNER, {"token": digest_of(b"other")}),
    "of another model": (WINNER, {"model_digest": digest_of(b"other")}),
}


@pytest.mark.parametrize(("signer", "changes"), FOREIGN_PROOFS.values(), ids=FOREIGN_PROOFS)
def test_a_proof_that_does_not_belong_here_changes_nothing(signer, changes):
    job = make_job()
    with pytest.raises(RemoteProtocolError) as caught:
        prove(job, signer, USAGE, **changes)
    assert caught.value.action is PeerAction.IGNORE
    assert (job.state, job.proofs) == (JobState.AWARDED, {})


def test_a_delivery_that_does_not_belong_here_changes_nothing():
    job = make_job()
    report = make_report(WINNER.peer_id)
    for delivery, signer in (
        (delivery_of(report), STRANGER),
        (make_delivery(STRANGER.peer_id, report), GATEWAY),
        (delivery_of(report, report), GATEWAY),
    ):
        with pytest.raises(RemoteProtocolError):
            deliver(job, delivery, signer=signer)
    assert (job.state, job.delivery) == (JobState.AWARDED, None)


def test_the_hold_covers_the_dearest_way_to_reach_every_limit():
    terms = make_job().contract.terms
    assert hold_for(terms, DEFAULT_POLICY) == 200 * 400 + 100 * 1600
    odd = PriceList(input=1_000_000, cached_input=9_000_000, output=0)
    assert hold_for(terms.model_copy(update={"max_prices": odd}), DEFAULT_POLICY) == 200 * 9
