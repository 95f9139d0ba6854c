"""What follows a failure: the next provider, or an error that says whose fault it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dispatches import NOW, PROVIDERS, TTL, assignment

from pinaivu_gateway.failover import (
    BASE_PATIENCE,
    LAST_MOMENT,
    PATIENCE_PER_TOKEN,
    Failure,
    GiveUp,
    TryNext,
    first_token_patience,
    next_step,
)
from pinaivu_gateway.jobs import (
    PromptNotAccepted,
    PromptTooLong,
    ProvidersFailed,
    StreamBroken,
)
from pinaivu_node.protocol.inference import RefuseReason
from pinaivu_node.protocol.market import SegmentOutcome

BIDDERS = (assignment(0), assignment(1), assignment(2))
DIED = Failure(SegmentOutcome.DIED, "its connection was lost")
REFUSALS_OF_THE_PROMPT = {RefuseReason.PROMPT_REFUSED}


def test_the_winner_is_first_and_the_standbys_are_kept() -> None:
    step = next_step(None, BIDDERS, delivered=0, now=NOW)
    assert step == TryNext(BIDDERS[0], BIDDERS[1:])


@pytest.mark.parametrize(
    "failure",
    [
        DIED,
        Failure(SegmentOutcome.STALLED, "no token came"),
        Failure(SegmentOutcome.ERROR, "it broke the protocol"),
        Failure(SegmentOutcome.CANCELLED, "it stopped by itself"),
        *[
            Failure(SegmentOutcome.REFUSED, reason.value, reason)
            for reason in RefuseReason
            if reason not in REFUSALS_OF_THE_PROMPT
        ],
    ],
    ids=lambda failure: failure.explanation,
)
def test_before_the_first_token_a_standby_takes_over(failure: Failure) -> None:
    step = next_step(failure, BIDDERS[1:], delivered=0, now=NOW)
    assert step == TryNext(BIDDERS[1], BIDDERS[2:])


def test_after_the_first_token_the_answer_ends_with_what_happened() -> None:
    step = next_step(DIED, BIDDERS[1:], delivered=1, now=NOW)
    assert isinstance(step, GiveUp)
    assert isinstance(step.error, StreamBroken)
    assert DIED.explanation in str(step.error)


@pytest.mark.parametrize(
    ("explanation", "error"),
    [
        ("This model's maximum context length is 8192 tokens. You asked for more.", PromptTooLong),
        ("this model has no chat template", PromptNotAccepted),
        ("", PromptNotAccepted),
    ],
)
def test_a_prompt_that_the_engine_cannot_run_is_nobody_elses_to_try(
    explanation: str, error: type[Exception]
) -> None:
    refused = Failure(SegmentOutcome.REFUSED, explanation, RefuseReason.PROMPT_REFUSED)
    step = next_step(refused, BIDDERS[1:], delivered=0, now=NOW)
    assert isinstance(step, GiveUp)
    assert type(step.error) is error
    assert str(step.error)
    assert explanation in str(step.error)


def test_when_nobody_is_left_the_last_failure_is_told() -> None:
    step = next_step(DIED, (), delivered=0, now=NOW)
    assert isinstance(step, GiveUp)
    assert isinstance(step.error, ProvidersFailed)
    assert DIED.explanation in str(step.error)


def test_tokens_that_have_expired_are_not_dispatched() -> None:
    late = assignment(1, expires_at=NOW)
    assert next_step(DIED, (late, BIDDERS[2]), delivered=0, now=NOW) == TryNext(BIDDERS[2], ())
    step = next_step(None, (late,), delivered=0, now=NOW)
    assert isinstance(step, GiveUp)
    assert isinstance(step.error, ProvidersFailed)


def test_every_failure_brings_the_end_nearer() -> None:
    """Whatever fails, each provider is tried once at most."""
    tried, remaining = [], BIDDERS
    failure: Failure | None = None
    while isinstance(step := next_step(failure, remaining, delivered=0, now=NOW), TryNext):
        tried.append(step.assignment.provider)
        remaining, failure = step.rest, replace(DIED)
    assert tried == [each.peer_id for each in PROVIDERS]


def test_a_standby_is_reached_before_its_token_expires() -> None:
    patience = first_token_patience(BIDDERS[1:], input_estimate=20, now=NOW)
    assert 0 < patience <= (TTL - LAST_MOMENT) / 1000


def test_a_long_prompt_is_given_the_time_it_takes_to_read() -> None:
    """Failing over could only start it again from the beginning, on a token that has expired."""
    tokens = 10_000
    patience = first_token_patience(BIDDERS[1:], input_estimate=tokens, now=NOW)
    assert patience >= BASE_PATIENCE + PATIENCE_PER_TOKEN * tokens


@pytest.mark.parametrize("rest", [(), BIDDERS[1:]])
def test_a_delay_that_was_said_is_waited_for(rest) -> None:
    delay = TTL + 10_000
    patience = first_token_patience(rest, input_estimate=20, now=NOW, delay=delay)
    assert patience > (delay + 1000) / 1000 + BASE_PATIENCE


def test_a_short_delay_still_leaves_time_for_a_standby() -> None:
    patience = first_token_patience(BIDDERS[1:], input_estimate=20, now=NOW, delay=5000)
    assert 5 < patience <= (TTL - LAST_MOMENT) / 1000


def test_nobody_is_made_to_wait_for_any_delay() -> None:
    patience = first_token_patience((), input_estimate=20, now=NOW, delay=10**10)
    assert patience < 60 + 4 * BASE_PATIENCE


def test_the_last_provider_is_given_more_time() -> None:
    with_standby = first_token_patience(BIDDERS[1:], input_estimate=20, now=NOW)
    assert first_token_patience((), input_estimate=20, now=NOW) > 2 * with_standby
