"""One job from its award to its delivery: dispatched, failed over, handed on, signed for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final, Self

import trio
from pydantic import BaseModel, NonNegativeInt, PositiveFloat, PositiveInt

from pinaivu_gateway.attempt import Attempt
from pinaivu_gateway.awards import Assignment
from pinaivu_gateway.failover import (
    Failure,
    GiveUp,
    first_token_patience,
    lost_in_mid_answer,
    next_step,
)
from pinaivu_gateway.jobs import (
    DeadlinePassed,
    JobError,
    JobEvent,
    JobFinished,
    JobOrder,
)
from pinaivu_gateway.provider_link import ProviderLink, ProviderLinks
from pinaivu_gateway.segment import Segment
from pinaivu_node.protocol.ids import Digest, Milliseconds, PeerId, UnixMilliseconds, digest_of
from pinaivu_node.protocol.inference import Dispatch
from pinaivu_node.protocol.market import Delivery, Outcome, SegmentOutcome


class MarketConfig(BaseModel, frozen=True, extra="forbid"):
    """Every number that buying goes by.  Durations are in seconds."""

    auction_timeout: PositiveFloat = 5.0
    """From JobRequest to its answer: the longest auction takes half a second, a busy coordinator
    and a slow disk the rest."""
    auction_repeats: NonNegativeInt = 2
    """Further auctions for a job that nobody bid on while every place was taken: a wait of a second
    in all, which is shorter than a client's own retry."""
    open_timeout: PositiveFloat = 3.0
    """To reach a winner that we have no stream to: a dial and two round trips."""
    accept_timeout: PositiveFloat = 5.0
    """From Dispatch to Accept or Refuse: a round trip, and tokenising the longest prompt."""
    stall_timeout: PositiveFloat = 30.0
    """Between two tokens; a batch that swallows others' long prompts pauses for seconds."""
    cancel_grace: PositiveFloat = 2.0
    """What a provider may take to answer a Cancel with its proof: an engine's step, a signature."""
    leave_timeout: PositiveFloat = 5.0
    """What leaving the market waits for deliveries to be signed and stored."""
    max_links: PositiveInt = 256
    """Providers whose stream is opened ahead of need; a winner beyond them is dialled then."""
    linger: PositiveFloat = 60.0
    """How long a stream to a provider that nobody lists is kept: longer than the coordinator and
    its providers take to come back after a restart."""
    max_deliveries: PositiveInt = 100_000
    """Deliveries without a receipt, a kilobyte each: hours of trading with a coordinator away."""


@dataclass(frozen=True, slots=True)
class Buyer:
    """What every purchase of this gateway works with."""

    gateway: PeerId
    links: ProviderLinks
    config: MarketConfig
    now: Callable[[], UnixMilliseconds]
    """Read on the coordinator's clock."""


class Purchase:
    """A job that was awarded; implements `jobs.Job` once `begin` has returned."""

    def __init__(
        self, order: JobOrder, assignments: tuple[Assignment, ...], buyer: Buyer, *, deadline: float
    ) -> None:
        """`deadline` is on trio's clock."""
        self.order: Final = order
        self.failovers = 0
        self._remaining = assignments
        self._buyer: Final = buyer
        self._deadline: Final = deadline
        self._attempts: list[tuple[Attempt, ProviderLink, float | None]] = []
        self._is_failed = False

    @property
    def provider(self) -> PeerId:
        """Who serves it."""
        return self._attempts[-1][0].segment.provider

    @property
    def model_digest(self) -> Digest:
        """What it says to run, fixed by the dispatch token."""
        return self._attempts[-1][0].segment.assignment.token.model_digest

    async def begin(self) -> None:
        """Dispatch, from the winner to the last standby, until there is a token or an end.

        Raises the JobError of the last failure, or DeadlinePassed.
        """
        error: JobError = DeadlinePassed("no token came within the time given")
        with trio.move_on_at(self._deadline):
            found = await self._try_all()
            if found is None:
                return
            error = found
        self._is_failed = True
        raise error

    def events(self) -> AsyncIterator[JobEvent]:
        """The first token and everything after it; see `jobs.Job`."""
        return _Events(self)

    async def next_event(self) -> JobEvent:
        """What came next.  Raises StreamBroken, and may not be called after JobFinished."""
        attempt = self._attempts[-1][0]
        while True:
            event = attempt.take()
            if event is not None:
                return event
            if attempt.failure is not None:
                self._is_failed = True
                raise lost_in_mid_answer(attempt.failure)
            await self._wait(attempt)

    def stop(self) -> None:
        """The client wants no more, or has everything: the provider is told to stop, at once."""
        if self._attempts:
            attempt, link, _ = self._attempts[-1]
            if not attempt.is_over:
                link.cancel(attempt.request_id)

    async def wait_over(self) -> None:
        """Wait, but not long, for the provider's last word, so that both count the same."""
        if not self._attempts:
            return
        attempt, link, ended_at = self._attempts[-1]
        with trio.move_on_after(self._buyer.config.cancel_grace):
            await attempt.wait_over()
        link.drop(attempt.request_id)
        self._attempts[-1] = (attempt, link, ended_at or trio.current_time())

    def delivery(self) -> Delivery:
        """What there is to sign for."""
        now = trio.current_time()
        last = self._attempts[-1][0] if self._attempts else None
        return Delivery(
            request_id=self.order.request_id,
            gateway=self._buyer.gateway,
            segments=tuple(
                attempt.segment.report(attempt.outcome, now=ended_at or now)
                for attempt, _, ended_at in self._attempts
            ),
            outcome=self._outcome(last),
            output_hash=last.segment.output_hash if last else digest_of(b""),
        )

    def _outcome(self, last: Attempt | None) -> Outcome:
        if last is not None and last.finished is not None:
            return Outcome.COMPLETED
        return Outcome.FAILED if self._is_failed else Outcome.CANCELLED

    async def _try_all(self) -> JobError | None:
        """None when there is a token; why there is none otherwise."""
        failure: Failure | None = None
        while True:
            step = next_step(failure, self._remaining, delivered=0, now=self._buyer.now())
            if isinstance(step, GiveUp):
                return step.error
            self.failovers += failure is not None
            self._remaining = step.rest
            failure = await self._attempt(step.assignment)
            if failure is None:
                return None

    async def _attempt(self, assignment: Assignment) -> Failure | None:
        """Dispatch to one provider and wait for its first token; how it failed, or None."""
        buyer = self._buyer
        link = buyer.links.link_to(assignment.provider, assignment.addresses)
        if not link.is_open:
            with trio.move_on_after(buyer.config.open_timeout):
                await link.wait_open()
        segment = Segment(
            assignment,
            gateway=buyer.gateway,
            input_estimate=self.order.input_estimate,
            now=trio.current_time(),
            answers=self.order.sampling.n,
        )
        attempt = Attempt(segment)
        self._attempts.append((attempt, link, None))
        link.dispatch(attempt, self._dispatch(assignment))
        await self._wait_begun(attempt, delay=assignment.token.delay_ms)
        if attempt.failure is None or segment.has_begun:
            return None
        link.cancel(attempt.request_id)
        link.drop(attempt.request_id)
        self._attempts[-1] = (attempt, link, trio.current_time())
        return attempt.failure

    async def _wait_begun(self, attempt: Attempt, *, delay: Milliseconds) -> None:
        with trio.move_on_after(self._buyer.config.accept_timeout):
            await attempt.wait_accepted()
        if not (attempt.is_accepted or attempt.is_over):
            attempt.fail(SegmentOutcome.STALLED, "it did not answer the dispatch")
            return
        patience = first_token_patience(
            self._remaining,
            input_estimate=self.order.input_estimate,
            now=self._buyer.now(),
            delay=delay,
        )
        with trio.move_on_after(patience):
            await attempt.wait_begun()
        if not (attempt.segment.has_begun or attempt.is_over):
            attempt.fail(SegmentOutcome.STALLED, f"no token came within {patience:.0f} s")

    async def _wait(self, attempt: Attempt) -> None:
        """Until something came; a provider that is silent for too long has failed."""
        give_up_at = min(trio.current_time() + self._buyer.config.stall_timeout, self._deadline)
        with trio.move_on_at(give_up_at) as scope:
            await attempt.wait_changed()
        if scope.cancelled_caught:
            if trio.current_time() >= self._deadline:
                attempt.fail(SegmentOutcome.CANCELLED, "the time given for the answer is over")
            else:
                attempt.fail(SegmentOutcome.STALLED, "no more tokens came")
            self._attempts[-1][1].cancel(attempt.request_id)

    def _dispatch(self, assignment: Assignment) -> Dispatch:
        order = self.order
        return Dispatch(
            request_id=order.request_id,
            token=assignment.envelope,
            prompt=order.prompt,
            sampling=order.sampling,
            tenant=order.tenant,
            fingerprints=order.fingerprints,
        )


class _Events:
    """An iterator that holds nothing open, so that it may be left at any point."""

    def __init__(self, purchase: Purchase) -> None:
        self._purchase = purchase
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> JobEvent:
        if self._is_over:
            raise StopAsyncIteration
        event = await self._purchase.next_event()
        self._is_over = isinstance(event, JobFinished)
        return event
