"""What to do when a provider fails: go to the next, or tell the client.  Pure.

Before the first token nothing has been promised to the client, so the next standby gets the whole
prompt.  After it the answer ends with an error: what was handed out stands and is paid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pinaivu_gateway.awards import Assignment
from pinaivu_gateway.jobs import (
    JobError,
    PromptNotAccepted,
    PromptTooLong,
    ProvidersFailed,
    StreamBroken,
)
from pinaivu_node.protocol.ids import Milliseconds, UnixMilliseconds
from pinaivu_node.protocol.inference import RefuseReason
from pinaivu_node.protocol.market import NO_DELAY, SegmentOutcome

CONTEXT_WORDS: Final = "maximum context length"
"""By which every engine that speaks OpenAI's API says that the prompt is too long."""
LAST_MOMENT: Final = Milliseconds(1000)
"""How long before a standby's token expires it is dispatched to at the latest: the message takes
a dial and a round trip."""
BASE_PATIENCE: Final = 10.0
PATIENCE_PER_TOKEN: Final = 0.02
"""Seconds until a first token is overdue: a short wait for a place, and the prompt at 50 tokens a
second, which a slow CPU reads."""
LONGEST_DELAY: Final = Milliseconds(60_000)
"""Of what a bid may say that its provider has to do first, for which a client is made to wait."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt ended that did not succeed."""

    outcome: SegmentOutcome
    explanation: str
    refusal: RefuseReason | None = None


@dataclass(frozen=True, slots=True)
class TryNext:
    """Dispatch to this one."""

    assignment: Assignment
    rest: tuple[Assignment, ...]


@dataclass(frozen=True, slots=True)
class GiveUp:
    """There is nothing left to try."""

    error: JobError


def next_step(
    failure: Failure | None,
    remaining: Sequence[Assignment],
    *,
    delivered: int,
    now: UnixMilliseconds,
) -> TryNext | GiveUp:
    """What follows a failure, or None for the beginning; `now` is read on the coordinator's clock.

    `delivered`: output tokens that the client was given already.
    """
    if failure is not None:
        if delivered:
            return GiveUp(lost_in_mid_answer(failure))
        if failure.refusal is RefuseReason.PROMPT_REFUSED:
            # The next would only say the same.
            return GiveUp(_prompt_error(failure.explanation))
    usable = [each for each in remaining if now < each.token.expires_at]
    if usable:
        return TryNext(usable[0], tuple(usable[1:]))
    last = f"; the last one: {_said(failure)}" if failure else ""
    return GiveUp(ProvidersFailed(f"every provider that was awarded the job failed{last}"))


def lost_in_mid_answer(failure: Failure) -> JobError:
    """What the client is told when an answer ends that had begun."""
    return StreamBroken(f"the provider was lost in mid-answer: {_said(failure)}")


def first_token_patience(
    rest: Sequence[Assignment],
    *,
    input_estimate: int,
    now: UnixMilliseconds,
    delay: Milliseconds = NO_DELAY,
) -> float:
    """Seconds to wait for a first token; `delay` is what the bid said has to be done first.

    Where a standby could still take over, not past its token's expiry, provided that the prompt
    itself leaves hope of a first token by then.
    """
    first = min(delay, LONGEST_DELAY) / 1000
    patience = BASE_PATIENCE + PATIENCE_PER_TOKEN * input_estimate
    if rest:
        until_expiry = (rest[0].token.expires_at - LAST_MOMENT - now) / 1000
        if until_expiry > first + PATIENCE_PER_TOKEN * input_estimate:
            return min(first + patience, until_expiry)
    # Nobody is left to take over: only a provider that hangs is given up.
    return first + 3 * patience


def _prompt_error(explanation: str) -> JobError:
    if CONTEXT_WORDS in explanation:
        return PromptTooLong(explanation)
    return PromptNotAccepted(explanation or "the model cannot run this prompt")


def _said(failure: Failure) -> str:
    return failure.explanation or failure.outcome.value
