from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies

from pinaivu_node.protocol import inference
from pinaivu_node.protocol.ids import digest_of
from pinaivu_node.protocol.inference import ChatTurn, Prompt, Refuse, RefuseReason, Sampling
from pinaivu_node.protocol.market import DispatchToken, JobKind, Voucher
from pinaivu_node.provider.dispatch import Doorkeeper, check_dispatch_untrusted


@pytest.fixture
def answer(facts):
    def made(dispatch, *, stock=None, sender=None, now=facts.epoch, **changes):
        fields = {
            "me": facts.provider.peer_id,
            "coordinator": facts.coordinator.peer_id,
            "stock": facts.stock() if stock is None else stock,
            "used": frozenset(),
            "first_issue": facts.epoch,
            "max_queued": 2,
            "max_prompt_characters": 1000,
            "places_of_gateway": 1,
            "draining": False,
        }
        sender = sender or facts.gateway.peer_id
        door = Doorkeeper(**(fields | changes))
        return check_dispatch_untrusted(dispatch, door, sender=sender, now=now)

    return made


def refused(answer, reason):
    assert isinstance(answer, Refuse)
    assert answer.reason is reason
    assert answer.explanation


def test_an_honest_dispatch_is_let_in(facts, answer):
    token = facts.token()
    assert answer(facts.dispatch(token=token)) == token


def test_a_token_of_another_signer(facts, answer):
    refused(answer(facts.dispatch(signer=facts.stranger)), RefuseReason.WRONG_SIGNER)


def test_a_token_whose_signature_does_not_fit(facts, answer):
    dispatch = facts.dispatch()
    forged = dispatch.token.model_copy(update={"signature": bytes(64)})
    refused(answer(dispatch.model_copy(update={"token": forged})), RefuseReason.WRONG_SIGNER)


def test_a_signed_message_that_is_no_token(facts, answer):
    dispatch = facts.dispatch()
    voucher = Voucher(
        request_id=dispatch.request_id, provider=facts.provider.peer_id, output_tokens=1
    )
    other = dispatch.model_copy(update={"token": facts.coordinator.seal(voucher)})
    refused(answer(other), RefuseReason.MALFORMED_TOKEN)


def test_a_token_of_another_request(facts, answer):
    dispatch = facts.dispatch().model_copy(update={"request_id": facts.request_id()})
    refused(answer(dispatch), RefuseReason.MALFORMED_TOKEN)


def test_a_token_for_another_provider(facts, answer):
    dispatch = facts.dispatch(provider=facts.stranger.peer_id)
    refused(answer(dispatch), RefuseReason.OTHER_PROVIDER)


def test_a_token_that_somebody_else_brings(facts, answer):
    refused(answer(facts.dispatch(), sender=facts.stranger.peer_id), RefuseReason.OTHER_GATEWAY)


def test_an_expired_token(facts, answer):
    dispatch = facts.dispatch(expires_at=facts.epoch + 10)
    assert isinstance(answer(dispatch, now=facts.epoch + 9), DispatchToken)
    refused(answer(dispatch, now=facts.epoch + 10), RefuseReason.EXPIRED)


def test_a_job_whose_deadline_has_passed(facts, answer):
    dispatch = facts.dispatch(deadline=facts.epoch + 5)
    refused(answer(dispatch, now=facts.epoch + 5), RefuseReason.EXPIRED)


def test_a_token_that_was_used(facts, answer):
    dispatch = facts.dispatch()
    refused(answer(dispatch, used={dispatch.request_id}), RefuseReason.REPLAYED)


def test_a_token_that_was_used_stays_used_when_it_has_expired(facts, answer):
    dispatch = facts.dispatch()
    late = facts.epoch + 60_000
    refused(answer(dispatch, used={dispatch.request_id}, now=late), RefuseReason.REPLAYED)


def test_a_token_from_before_our_start(facts, answer):
    dispatch = facts.dispatch()
    refused(answer(dispatch, first_issue=facts.epoch + 1), RefuseReason.REPLAYED)


def test_a_model_that_is_not_served(facts, answer):
    refused(answer(facts.dispatch(model="another:1b")), RefuseReason.WRONG_MODEL)


def test_other_weights(facts, answer):
    dispatch = facts.dispatch(model_digest=digest_of(b"other"))
    refused(answer(dispatch), RefuseReason.WRONG_MODEL)


def test_a_kind_of_job_that_the_model_cannot_do(facts, answer):
    stock = facts.stock(kinds=(JobKind.COMPLETION,))
    refused(answer(facts.dispatch(), stock=stock), RefuseReason.WRONG_MODEL)


def test_another_prompt_than_the_auctioned(facts, answer):
    dispatch = facts.dispatch().model_copy(update={"prompt": facts.prompt("something else")})
    refused(answer(dispatch), RefuseReason.WRONG_INPUT)


@pytest.mark.parametrize(
    ("kind", "forms"),
    [
        (JobKind.CHAT, {}),
        (JobKind.CHAT, {"text": "x"}),
        (JobKind.CHAT, {"turns": (ChatTurn(role="user", content="x"),), "text": "x"}),
        (JobKind.COMPLETION, {"turns": (ChatTurn(role="user", content="x"),)}),
        (JobKind.COMPLETION, {"text": "x", "token_ids": (1,)}),
    ],
)
def test_a_prompt_in_the_wrong_form(facts, answer, kind, forms):
    prompt = Prompt(nonce=bytes(16), **forms)
    refused(answer(facts.dispatch(prompt=prompt, kind_of_job=kind)), RefuseReason.WRONG_INPUT)


@pytest.mark.parametrize("forms", [{"text": "x"}, {"token_ids": (1, 2)}])
def test_a_completion_takes_text_or_tokens(facts, answer, forms):
    prompt = Prompt(nonce=bytes(16), **forms)
    token = answer(facts.dispatch(prompt=prompt, kind_of_job=JobKind.COMPLETION))
    assert isinstance(token, DispatchToken)


def test_other_sampling_than_the_auctioned(facts, answer):
    other = Sampling(max_tokens=32, temperature=0.5)
    dispatch = facts.dispatch().model_copy(update={"sampling": other})
    refused(answer(dispatch), RefuseReason.WRONG_SAMPLING)


def test_more_tokens_than_the_limit(facts, answer):
    refused(answer(facts.dispatch(output_limit=31)), RefuseReason.OVER_LIMITS)
    assert isinstance(answer(facts.dispatch(output_limit=32)), DispatchToken)


def test_more_tokens_to_go_on_from_than_the_limit(facts, answer):
    dispatch = facts.dispatch(resume=(1,) * 33, output_limit=32, rank=1)
    refused(answer(dispatch), RefuseReason.OVER_LIMITS)


@pytest.mark.parametrize("forms", [{"text": "x" * 1001}, {"token_ids": (1,) * 251}])
def test_a_prompt_longer_than_we_take(facts, answer, forms):
    prompt = Prompt(nonce=bytes(16), **forms)
    dispatch = facts.dispatch(prompt=prompt, kind_of_job=JobKind.COMPLETION)
    refused(answer(dispatch), RefuseReason.OVER_LIMITS)


TOOLS = inference.ToolUse(tools=(inference.Tool(name="weather", parameters="x" * 990),))


def test_tools_and_calls_are_of_the_prompts_length(facts, answer):
    hello = inference.ChatTurn(role="user", content="hi")
    call = inference.ToolCall(id="1", name="weather", arguments="x" * 990)
    called = inference.ChatTurn(role="assistant", content="", tool_calls=(call,))
    prompt = Prompt(nonce=bytes(16), turns=(hello,), tools=TOOLS)
    refused(answer(facts.dispatch(prompt=prompt)), RefuseReason.OVER_LIMITS)
    assert isinstance(
        answer(facts.dispatch(prompt=prompt), max_prompt_characters=1003), DispatchToken
    )
    refused(
        answer(facts.dispatch(prompt=Prompt(nonce=bytes(16), turns=(called,)))),
        RefuseReason.OVER_LIMITS,
    )


def test_a_completion_has_no_tools(facts, answer):
    prompt = Prompt(nonce=bytes(16), text="abc", tools=TOOLS)
    dispatch = facts.dispatch(prompt=prompt, kind_of_job=JobKind.COMPLETION)
    refused(answer(dispatch, max_prompt_characters=2000), RefuseReason.WRONG_INPUT)


def test_tools_and_constraint_are_those_of_the_auction(facts, answer):
    bare = facts.prompt()
    token = facts.token((bare, Sampling(max_tokens=32)))
    with_tools = bare.model_copy(update={"tools": TOOLS})
    dispatch = facts.dispatch(prompt=with_tools, token=token)
    refused(answer(dispatch, max_prompt_characters=2000), RefuseReason.WRONG_INPUT)
    constraint = inference.Constraint(kind=inference.ConstraintKind.JSON_OBJECT)
    constrained = Sampling(max_tokens=32, constraint=constraint)
    dispatch = facts.dispatch(sampling=constrained, token=token)
    refused(answer(dispatch), RefuseReason.WRONG_SAMPLING)


def test_no_place_and_no_place_to_wait(facts, answer):
    assert isinstance(answer(facts.dispatch(), stock=facts.stock(running=5)), DispatchToken)
    refused(answer(facts.dispatch(), stock=facts.stock(running=6)), RefuseReason.FULL)


def test_a_gateway_with_as_many_jobs_as_it_may_have(facts, answer):
    refused(answer(facts.dispatch(), places_of_gateway=0), RefuseReason.FULL)


def test_a_draining_provider(facts, answer):
    refused(answer(facts.dispatch(), draining=True), RefuseReason.DRAINING)


def test_an_engine_that_is_down(facts, answer):
    stock = facts.stock(ready=False)
    refused(answer(facts.dispatch(), stock=stock), RefuseReason.ENGINE_UNAVAILABLE)


@hypothesis.given(body=strategies.binary(max_size=200))
@hypothesis.settings(
    max_examples=50, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_whatever_the_coordinator_signed_is_a_token_or_malformed(facts, answer, body):
    from pinaivu_node.protocol.signing import Envelope, signed_bytes

    signature = facts.coordinator._key.sign(signed_bytes("dispatch_token/1", body)).signature
    envelope = Envelope(
        content="dispatch_token/1",
        body=body,
        signer=facts.coordinator.peer_id,
        signature=signature,
    )
    dispatch = facts.dispatch().model_copy(update={"token": envelope})
    refused(answer(dispatch), RefuseReason.MALFORMED_TOKEN)


def test_a_winner_has_nothing_to_go_on_from(facts, answer):
    refused(answer(facts.dispatch(resume=(1,))), RefuseReason.OVER_LIMITS)
    assert isinstance(answer(facts.dispatch(resume=(1,), rank=1)), DispatchToken)
