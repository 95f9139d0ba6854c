"""Whom to try next, how long to wait, and what to tell the client."""

from __future__ import annotations

import pytest
from provider_actor import WEIGHTS, peer_of, signer_of

from pinaivu_gateway.awards import Assignment
from pinaivu_gateway.failover import (
    Failure,
    GiveUp,
    TryNext,
    first_token_patience,
    next_step,
)
from pinaivu_gateway.jobs import PromptNotAccepted, PromptTooLong, ProvidersFailed, StreamBroken
from pinaivu_node.protocol.ids import digest_of, request_id_of
from pinaivu_node.protocol.inference import RefuseReason
from pinaivu_node.protocol.market import DispatchToken, JobKind, SegmentOutcome
from pinaivu_node.protocol.money import PriceList

NOW = 1_800_000_000_000
DIED = Failure(SegmentOutcome.DIED, "the stream was lost")


def assignment(name: str, *, expires_in: int = 10_000) -> Assignment:
    nothing = digest_of(b"")
    token = DispatchToken(
        request_id=request_id_of(bytes(16)),
        provider=peer_of(name),
        gateway=peer_of("gateway"),
        kind_of_job=JobKind.CHAT,
        model="smollm2:135m",
        model_digest=WEIGHTS,
        rank=0,
        input_limit=100,
        output_limit=100,
        prices=PriceList(input=1, cached_input=1, output=1),
        uplift_ppm=0,
        sampling_digest=nothing,
        input_commitment=nothing,
        bid_set_root=nothing,
        policy_hash=nothing,
        issued_at=NOW,
        expires_at=NOW + expires_in,
        deadline=NOW + 60_000,
    )
    return Assignment(token, signer_of("coordinator").seal(token), ())


def test_the_winner_comes_first_and_the_standbys_in_their_order():
    a, b, c = assignment("a"), assignment("b"), assignment("c")
    step = next_step(None, [a, b, c], delivered=0, now=NOW)
    assert step == TryNext(a, (b, c))
    assert next_step(DIED, step.rest, delivered=0, now=NOW) == TryNext(b, (c,))


def test_an_expired_token_is_not_even_tried():
    late, fresh = assignment("a", expires_in=500), assignment("b")
    assert next_step(DIED, [late, fresh], delivered=0, now=NOW + 500) == TryNext(fresh, ())


def test_with_nobody_left_the_client_hears_of_the_last_failure():
    step = next_step(DIED, [], delivered=0, now=NOW)
    assert isinstance(step, GiveUp)
    assert isinstance(step.error, ProvidersFailed)
    assert "the stream was lost" in str(step.error)


def test_after_the_first_token_nobody_else_is_asked():
    step = next_step(DIED, [assignment("b")], delivered=1, now=NOW)
    assert isinstance(step, GiveUp)
    assert isinstance(step.error, StreamBroken)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("This model's maximum context length is 5 tokens.", PromptTooLong),
        ("The prompt is empty.", PromptNotAccepted),
        ("", PromptNotAccepted),
    ],
)
def test_a_refused_prompt_is_the_clients_to_change(words: str, error: type[Exception]):
    failure = Failure(SegmentOutcome.REFUSED, words, RefuseReason.PROMPT_REFUSED)
    step = next_step(failure, [assignment("b")], delivered=0, now=NOW)
    assert isinstance(step, GiveUp)
    assert type(step.error) is error
    assert str(step.error)


def test_patience_ends_while_a_standby_can_still_take_over():
    assert first_token_patience([assignment("b")], input_estimate=20, now=NOW) == 9.0


def test_a_long_prompt_is_waited_for_though_its_standby_expires():
    assert first_token_patience([assignment("b")], input_estimate=2000, now=NOW) > 100


def test_the_last_provider_is_given_longer_than_one_that_can_be_replaced():
    assert first_token_patience([], input_estimate=20, now=NOW) > 30
