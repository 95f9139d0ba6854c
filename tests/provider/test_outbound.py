from __future__ import annotations

import math

import pytest

from pinaivu_node.engine.types import (
    Alternative,
    FinishReason,
    TokenEvent,
    TokenLogprob,
    ToolCallDelta,
)
from pinaivu_node.protocol import inference
from pinaivu_node.protocol.answer import digest_of_answer, digest_of_answers
from pinaivu_node.protocol.inference import TO_GATEWAY, Accept, Done, Finish, Tokens
from pinaivu_node.protocol.market import Proof
from pinaivu_node.protocol.signing import open_untrusted
from pinaivu_node.protocol.wire import decode_untrusted
from pinaivu_node.provider.jobs import AT_LIMIT, CANCELLED, STOPPED, Job
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


def event(ids, text, **extras):
    return TokenEvent("r", ids, text, input_tokens=20, **extras)


def decoded(outbound):
    return [decode_untrusted(frame, *TO_GATEWAY) for frame in outbound.frames()]


def test_all_that_waits_leaves_in_order_and_tokens_in_one_frame(outbound, job):
    one, two = job(), job()
    outbound.answer(Accept(request_id=one.request_id))
    outbound.add(one, event((1, 2), "ab"))
    outbound.add(two, event((7,), "x"))
    outbound.add(one, event((3,), "c"))
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
    outbound.add(one, event((1, 2), "ab"))
    frames = outbound.frames()
    next(frames)
    assert one.output_tokens == 0
    next(frames)
    assert one.output_tokens == 2


def test_a_job_that_ends_while_a_round_is_sent_waits_for_its_last_tokens(outbound, job):
    one = job()
    outbound.add(one, event((1,), "a"))
    frames = outbound.frames()
    next(frames)
    outbound.add(one, event((2,), "b"))
    outbound.end(one, STOPPED)
    assert list(frames) == []
    tokens, done = decoded(outbound)
    assert tokens.deltas[0].position == 1
    assert isinstance(done, Done)


def test_positions_go_on_after_what_another_provider_delivered(outbound, job):
    one = job(resume=(5, 6, 7))
    outbound.add(one, event((8,), "d"))
    (tokens,) = decoded(outbound)
    assert tokens.deltas[0].position == 3
    assert one.output_tokens == 1


def test_dropped_tokens_are_neither_sent_nor_counted(outbound, job):
    one, two = job(), job()
    outbound.add(one, event((1,), "a"))
    outbound.add(two, event((1,), "a"))
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
        outbound.add(each, event(tuple(range(5000)), "ü" * 40_000))
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
    outbound.add(one, event((1,), "a\ud83d"))
    (tokens,) = decoded(outbound)
    assert isinstance(tokens, Tokens)
    proof = one.proof(STOPPED, me=facts.provider.peer_id, now=1.0)
    assert proof.output_hash == text_hash(tokens.deltas[0].text) == text_hash("a?")


def likely(token_id, token=b"a", logprob=-0.5):
    return Alternative(token_id, token, logprob)


def test_logprobs_and_tool_calls_travel_beside_the_tokens(outbound, job):
    one = job()
    outbound.add(one, event((1,), "a", logprobs=(TokenLogprob(likely(1), (likely(1), likely(2))),)))
    outbound.add(one, event((2,), "", logprobs=(TokenLogprob(likely(2)),)))
    outbound.add(one, event((), "", tool_calls=(ToolCallDelta(0, "call_1", "weather", "{"),)))
    (tokens,) = decoded(outbound)
    [delta] = tokens.deltas
    assert delta.token_ids == (1, 2)
    assert delta.logprobs[0].top == ((1, b"a", -0.5), (2, b"a", -0.5))
    assert delta.logprobs[1].chosen == (2, b"a", -0.5)
    assert delta.tool_calls == (
        inference.ToolCallDelta(index=0, id="call_1", name="weather", arguments="{"),
    )
    assert outbound.waiting_bytes == 0


def test_what_an_engine_says_is_made_to_fit(outbound, job):
    """A model that was never told how long a name may be does not end the gateway's trust."""
    one = job()
    odd = (likely(1, b"x" * 5000, math.nan), likely(2, b"", -math.inf), likely(3, b"", 1e-9))
    calls = (ToolCallDelta(0, "i" * 99, "n" * 99, "ü\ud83d" * 70_000), ToolCallDelta(128, "x", "y"))
    outbound.add(one, event((1,), "", logprobs=(TokenLogprob(odd[0], odd * 9),), tool_calls=calls))
    deltas = [delta for frame in decoded(outbound) for delta in frame.deltas]
    [logprob] = deltas[0].logprobs
    assert logprob.chosen == (1, b"x" * 256, inference.LEAST_LOGPROB)
    assert [each[2] for each in logprob.top[:3]] == [-9999.0, -9999.0, 0.0]
    assert len(logprob.top) == 20
    pieces = [call for delta in deltas for call in delta.tool_calls]
    assert {call.index for call in pieces} == {0}
    assert [call.name for call in pieces] == ["n" * 64, *[None] * (len(pieces) - 1)]
    assert "".join(call.arguments for call in pieces) == "ü?" * 70_000


def test_a_flood_of_alternatives_is_cut_into_frames_that_a_peer_takes(outbound, job, facts):
    one = job()
    top = tuple(likely(number, b"x" * 256) for number in range(20))
    for number in range(1000):
        outbound.add(one, event((number,), "a", logprobs=(TokenLogprob(top[0], top),)))
    waiting = outbound.waiting_bytes
    sizes = []
    deltas = []
    for frame in outbound.frames():
        sizes.append(len(frame))
        deltas += decode_untrusted(frame, *TO_GATEWAY).deltas
    assert 0.8 * sum(sizes) < waiting < 1.2 * sum(sizes)
    assert [position for delta in deltas for position in delta.token_ids] == list(range(1000))
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
    proof = one.proof(STOPPED, me=facts.provider.peer_id, now=1.0)
    assert proof.output_hash == digest_of_answer("a" * 1000)


def test_several_answers_are_told_apart_and_each_says_its_own_end(outbound, job, facts):
    one = job(sampling=inference.Sampling(max_tokens=9, n=2))
    outbound.add(one, event((1,), "a", index=0))
    outbound.add(one, event((2,), "b", index=1))
    outbound.add(one, event((3,), "c", index=0, finish_reason=FinishReason.LENGTH))
    (tokens,) = decoded(outbound)
    assert [(d.index, d.position, d.text, d.finish) for d in tokens.deltas] == [
        (0, 0, "ac", Finish.LENGTH),
        (1, 2, "b", None),
    ]
    outbound.add(one, event((), "", index=1, finish_reason=FinishReason.STOP))
    outbound.end(one, STOPPED)
    tokens, done = decoded(outbound)
    assert [(d.index, d.token_ids, d.finish) for d in tokens.deltas] == [(1, (), Finish.STOP)]
    proof = open_untrusted(done.proof, Proof, signer=facts.provider.peer_id)
    assert proof.output_hash == digest_of_answers([("ac", ()), ("b", ())])
    assert proof.usage.output == 3


def test_a_job_is_over_with_the_last_of_its_answers_or_the_first_failure(job):
    one = job(sampling=inference.Sampling(max_tokens=9, n=2))
    assert one.ending_after(event((1,), "a", index=1, finish_reason=FinishReason.STOP)) is None
    assert one.ending_after(event((1,), "a", index=0)) is None
    ending = one.ending_after(event((1,), "a", index=0, finish_reason=FinishReason.LENGTH))
    assert ending is AT_LIMIT
    two = job(sampling=inference.Sampling(max_tokens=9, n=2))
    broken = event((), "", index=1, finish_reason=FinishReason.ERROR, error="it broke")
    assert two.ending_after(broken).finish is Finish.ERROR


def test_what_is_dropped_are_all_answers(outbound, job):
    one = job(sampling=inference.Sampling(max_tokens=9, n=2))
    outbound.add(one, event((1,), "a", index=0))
    outbound.add(one, event((2,), "b", index=1))
    outbound.drop_tokens(one)
    assert decoded(outbound) == []
    assert outbound.waiting_bytes == 0
