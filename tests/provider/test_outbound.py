from __future__ import annotations

import pytest

from pinaivu_node.protocol.inference import TO_GATEWAY, Accept, Done, Finish, Tokens
from pinaivu_node.protocol.wire import decode_untrusted
from pinaivu_node.provider.jobs import CANCELLED, STOPPED, Job
from pinaivu_node.provider.outbound import Outbound


@pytest.fixture
def outbound(facts):
    def seal(job, ending):
        proof = facts.provider.seal(job.proof(ending, me=facts.provider.peer_id, now=1.0))
        return Done(request_id=job.request_id, finish=ending.finish, proof=proof)

    return Outbound(seal)


@pytest.fixture
def job(facts):
    def made(**changes):
        dispatch = facts.dispatch(**changes)
        return Job(dispatch, facts.token(request_id=dispatch.request_id), now=0.0)

    return made


def decoded(outbound):
    return [decode_untrusted(frame, *TO_GATEWAY) for frame in outbound.frames()]


def test_all_that_waits_leaves_in_order_and_tokens_in_one_frame(outbound, job):
    one, two = job(), job()
    outbound.answer(Accept(request_id=one.request_id))
    outbound.add(one, (1, 2), "ab")
    outbound.add(two, (7,), "x")
    outbound.add(one, (3,), "c")
    outbound.end(one, STOPPED)
    accept, tokens, done = decoded(outbound)
    assert isinstance(accept, Accept)
    assert [(d.request_id, d.position, d.token_ids, d.text) for d in tokens.deltas] == [
        (one.request_id, 0, (1, 2, 3), "abc"),
        (two.request_id, 0, (7,), "x"),
    ]
    assert done.finish is Finish.STOP
    assert decoded(outbound) == []
    assert len(outbound) == outbound.waiting_bytes == 0


def test_tokens_count_when_their_frame_is_taken(outbound, job):
    one = job()
    outbound.answer(Accept(request_id=one.request_id))
    outbound.add(one, (1, 2), "ab")
    frames = outbound.frames()
    next(frames)
    assert one.output_tokens == 0
    next(frames)
    assert one.output_tokens == 2


def test_a_job_that_ends_while_a_round_is_sent_waits_for_its_last_tokens(outbound, job):
    one = job()
    outbound.add(one, (1,), "a")
    frames = outbound.frames()
    next(frames)
    outbound.add(one, (2,), "b")
    outbound.end(one, STOPPED)
    assert list(frames) == []
    tokens, done = decoded(outbound)
    assert tokens.deltas[0].position == 1
    assert isinstance(done, Done)


def test_positions_go_on_after_what_another_provider_delivered(outbound, job):
    one = job(resume=(5, 6, 7))
    outbound.add(one, (8,), "d")
    (tokens,) = decoded(outbound)
    assert tokens.deltas[0].position == 3
    assert one.output_tokens == 1


def test_dropped_tokens_are_neither_sent_nor_counted(outbound, job):
    one, two = job(), job()
    outbound.add(one, (1,), "a")
    outbound.add(two, (1,), "a")
    outbound.drop_tokens(one)
    outbound.end(one, CANCELLED)
    tokens, _ = decoded(outbound)
    assert [delta.request_id for delta in tokens.deltas] == [two.request_id]
    assert one.output_tokens == 0
    assert outbound.waiting_bytes == 0


def test_what_was_never_said_is_left_for_others_to_settle(outbound, job):
    one, two = job(), job()
    outbound.end(one, STOPPED)
    outbound.end(two, CANCELLED)
    next(outbound.frames())
    assert outbound.take_unfinished() == [(two, CANCELLED)]


def test_a_flood_is_cut_into_frames_that_a_peer_takes(outbound, job):
    jobs = [job() for _ in range(12)]
    for each in jobs:
        outbound.add(each, tuple(range(5000)), "ü" * 40_000)
    frames = decoded(outbound)
    assert len(frames) > 1
    deltas = [delta for frame in frames for delta in frame.deltas]
    for each in jobs:
        mine = [delta for delta in deltas if delta.request_id == each.request_id]
        assert "".join(delta.text for delta in mine) == "ü" * 40_000
        assert sum((delta.token_ids for delta in mine), ()) == tuple(range(5000))
        assert mine[1].position == 4096


def test_text_that_has_no_utf8_is_sent_as_it_is_hashed(outbound, job, text_hash, facts):
    one = job()
    outbound.add(one, (1,), "a\ud83d")
    (tokens,) = decoded(outbound)
    assert isinstance(tokens, Tokens)
    proof = one.proof(STOPPED, me=facts.provider.peer_id, now=1.0)
    assert proof.output_hash == text_hash(tokens.deltas[0].text) == text_hash("a?")
