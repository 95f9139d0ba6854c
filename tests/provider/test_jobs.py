from __future__ import annotations

import pytest

from pinaivu_node.engine import types
from pinaivu_node.engine.types import FinishReason, TokenEvent
from pinaivu_node.protocol import inference
from pinaivu_node.protocol.answer import digest_of_answer
from pinaivu_node.protocol.inference import Finish, Prompt, Sampling, ToolCallDelta
from pinaivu_node.protocol.market import SegmentOutcome, Voucher
from pinaivu_node.protocol.money import ZERO_USAGE, TokenUsage
from pinaivu_node.provider.jobs import STOPPED, Job, ending_of, generation_of, over_limits


@pytest.fixture
def job(facts):
    return Job(facts.dispatch(), facts.token(), now=10.0)


def event(**changes):
    fields = {"request_id": "r", "token_ids": (1,), "text": "a", "input_tokens": 20}
    return TokenEvent(**(fields | changes))


@pytest.fixture
def proof_of(facts):
    return lambda job, ending=STOPPED: job.proof(ending, me=facts.provider.peer_id, now=12.0)


def test_a_proof_says_what_was_done(job, proof_of, facts, text_hash):
    job.computed(event(token_ids=(), cached_tokens=15), now=10.1)
    job.computed(event(cached_tokens=15), now=10.25)
    job.sent(3, b"abc")
    proof = proof_of(job)
    assert proof.usage == TokenUsage(input=5, cached_input=15, output=3)
    assert proof.output_hash == text_hash("abc")
    assert proof.engine_ttft_ms == 250
    assert proof.duration_ms == 2000
    assert proof.gateway == facts.gateway.peer_id
    assert proof.voucher is None


def test_the_token_named_is_the_one_dispatched(facts, proof_of):
    dispatch = facts.dispatch()
    job = Job(dispatch, facts.token(), now=0.0)
    assert proof_of(job).token == dispatch.token.digest


def test_a_job_over_its_limits_is_worth_nothing(job, proof_of):
    job.computed(event(), now=11.0)
    job.sent(3, b"abc")
    proof = proof_of(job, over_limits("too long"))
    assert proof.usage == ZERO_USAGE
    assert proof.outcome is SegmentOutcome.REFUSED


def test_the_best_voucher_is_kept(job, proof_of, facts):
    def voucher(tokens):
        return facts.gateway.seal(
            Voucher(
                request_id=job.request_id, provider=facts.provider.peer_id, output_tokens=tokens
            )
        )

    job.sent(300, b"")
    best = voucher(256)
    job.vouched(voucher(128), 128)
    job.vouched(best, 256)
    job.vouched(voucher(64), 64)
    assert job.unvouched == 44
    assert proof_of(job).voucher == best


def test_a_voucher_for_tokens_to_come_gives_no_credit_for_them(job, facts):
    job.sent(10, b"")
    job.vouched(facts.gateway.seal(facts.token()), 1_000_000)
    job.sent(100, b"")
    assert job.unvouched == 100


@pytest.mark.parametrize(
    ("reason", "finish", "outcome"),
    [
        (FinishReason.STOP, Finish.STOP, SegmentOutcome.COMPLETED),
        (FinishReason.TOOL_CALLS, Finish.TOOL_CALLS, SegmentOutcome.COMPLETED),
        (FinishReason.LENGTH, Finish.LENGTH, SegmentOutcome.COMPLETED),
        (FinishReason.CANCELLED, Finish.CANCELLED, SegmentOutcome.CANCELLED),
        (FinishReason.ERROR, Finish.ERROR, SegmentOutcome.ERROR),
    ],
)
def test_every_end_of_a_generation_is_an_ending(reason, finish, outcome):
    ending = ending_of(event(finish_reason=reason, error="out of memory"))
    assert (ending.finish, ending.outcome) == (finish, outcome)
    assert ending.explanation == ("out of memory" if finish is Finish.ERROR else "")


def test_a_step_is_no_ending():
    assert ending_of(event()) is None


def test_the_engine_is_asked_for_what_was_dispatched(facts):
    sampling = Sampling(
        max_tokens=9, temperature=0.3, logit_bias=((5, -100.0),), stop=("\n",), seed=7
    )
    dispatch = facts.dispatch(sampling=sampling, resume=(1, 2))
    request = generation_of(dispatch, deadline_ms=500)
    assert request.id == dispatch.request_id
    assert request.prompt[0].content == "Hello there!"
    assert request.sampling.logit_bias == {5: -100.0}
    assert (request.sampling.max_tokens, request.sampling.seed) == (9, 7)
    assert request.resume_token_ids == (1, 2)
    assert request.deadline_ms == 500


def test_every_sampling_parameter_reaches_the_engine(facts):
    sampling = Sampling(
        max_tokens=9, temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, presence_penalty=0.5,
        frequency_penalty=-0.5, repetition_penalty=1.5, logit_bias=((5, -100.0),), stop=("a",),
        seed=7, ignore_eos=True, stop_token_ids=(4, 5), logprobs=20, n=3,
    )  # fmt: skip
    asked = generation_of(facts.dispatch(sampling=sampling), deadline_ms=1).sampling
    for name, value in sampling.model_dump().items():
        got = getattr(asked, name)
        assert (tuple(got.items()) if name == "logit_bias" else got) == value
    assert set(sampling.model_dump()) == set(Sampling.model_fields) - {"constraint"}


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        (inference.ConstraintKind, types.ConstraintKind),
        (inference.ToolChoice, types.ToolChoice),
        (inference.Finish, types.FinishReason),
    ],
)
def test_network_and_engine_use_the_same_words(said, asked):
    assert {each.value for each in said} == {each.value for each in asked}


def test_constraint_tools_and_calls_reach_the_engine(facts):
    sampling = Sampling(
        max_tokens=9,
        constraint=inference.Constraint(kind=inference.ConstraintKind.JSON_SCHEMA, text="{}"),
    )
    call = inference.ToolCall(id="call_1", name="weather", arguments="{}")
    prompt = Prompt(
        nonce=bytes(16),
        turns=(
            inference.ChatTurn(role="assistant", content="", tool_calls=(call,)),
            inference.ChatTurn(role="tool", content="rain", tool_call_id="call_1"),
        ),
        tools=inference.ToolUse(
            tools=(inference.Tool(name="weather", description="today's", parameters="{ }"),),
            choice=inference.ToolChoice.REQUIRED,
            named="weather",
            parallel=False,
        ),
    )
    request = generation_of(facts.dispatch(prompt=prompt, sampling=sampling), deadline_ms=1)
    assert request.constraint == types.Constraint(types.ConstraintKind.JSON_SCHEMA, "{}")
    assert request.tools == types.ToolUse(
        (types.Tool("weather", "today's", "{ }"),),
        types.ToolChoice.REQUIRED,
        named="weather",
        parallel=False,
    )
    assert request.prompt == (
        types.ChatMessage("assistant", "", (types.ToolCall("call_1", "weather", "{}"),)),
        types.ChatMessage("tool", "rain", tool_call_id="call_1"),
    )


def test_a_proof_covers_the_tool_calls(job, proof_of):
    call = inference.ToolCall(id="call_1", name="weather", arguments='{"a": 1}')
    job.sent(2, b"ab", [ToolCallDelta(index=0, id="call_1", name="weather", arguments='{"a"')])
    job.sent(2, b"c", [ToolCallDelta(index=0, arguments=": 1}")])
    assert proof_of(job).output_hash == digest_of_answer("abc", [call])


@pytest.mark.parametrize(("form", "value"), [("text", "abc"), ("token_ids", (1, 2))])
def test_completions_pass_text_or_tokens_on(facts, form, value):
    prompt = Prompt(nonce=bytes(16), **{form: value})
    assert generation_of(facts.dispatch(prompt=prompt), deadline_ms=1).prompt == value
