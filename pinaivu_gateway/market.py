"""The gateway's place in the market: buys jobs from providers through one coordinator.

    open_market ─┬─ the session with the coordinator       coordinator_link
                 ├─ one stream to each provider            provider_link
                 ├─ deliveries on their way to receipts    deliveries
                 └─ per finished job, one task that signs  here

A purchase itself runs in the task of whoever buys.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Final

import trio

from pinaivu_gateway import jobs
from pinaivu_gateway.awards import job_request, open_award_untrusted
from pinaivu_gateway.coordinator_link import CoordinatorLink
from pinaivu_gateway.deliveries import Deliveries
from pinaivu_gateway.jobs import (
    CoordinatorUnreachable,
    DeliveryOutbox,
    Job,
    JobError,
    JobOrder,
    Market,
    MarketStatistics,
    ProviderView,
)
from pinaivu_gateway.log_client import LogClient
from pinaivu_gateway.provider_link import ProviderLinks
from pinaivu_gateway.purchase import Buyer, MarketConfig, Purchase
from pinaivu_node.mesh.address import split_address
from pinaivu_node.mesh.mesh import Mesh
from pinaivu_node.mesh.session import keep_session
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import Milliseconds, PeerId, RequestId, UnixMilliseconds, digest_of
from pinaivu_node.protocol.market import (
    Award,
    Delivery,
    JobRefused,
    JobRequest,
    Outcome,
    RefusalReason,
    Role,
    Roster,
    RosterEntry,
)
from pinaivu_node.protocol.receipt import ReceiptReply
from pinaivu_node.protocol.signing import Signer
from pinaivu_node.protocol.topics import MARKET

logger = logging.getLogger(__name__)

__all__ = ["MarketConfig", "open_market"]

_AFTER_THE_CLOSE: Final = 0.1
_RECEIPT_POLL: Final = 1.0
"""Seconds between two looks at the log, should the news of a receipt have been lost."""
_ERRORS: Final[dict[RefusalReason, type[JobError]]] = {
    RefusalReason.UNKNOWN_MODEL: jobs.UnknownModel,
    RefusalReason.NO_BIDS: jobs.NoBids,
    RefusalReason.NOBODY_ELIGIBLE: jobs.NobodyEligible,
    RefusalReason.NO_CREDIT: jobs.NoCredit,
    RefusalReason.DUPLICATE: jobs.JobInvalid,
    RefusalReason.OVERLOADED: jobs.Overloaded,
    RefusalReason.INVALID: jobs.JobInvalid,
    RefusalReason.DEADLINE_PASSED: jobs.DeadlinePassed,
}


@contextlib.asynccontextmanager
async def open_market(
    mesh: Mesh,
    signer: Signer,
    coordinator_address: str,
    outbox: DeliveryOutbox,
    config: MarketConfig,
    *,
    clock: Callable[[], UnixMilliseconds],
) -> AsyncIterator[Market]:
    """A place in the market of this coordinator, which need not be there yet.

    Leaving stops what still runs, signs for it and stores that.  `mesh` and `outbox` stay the
    caller's.  Raises PeerUnreachable if the address can never be dialled.
    """
    _, coordinator = split_address(coordinator_address)
    deliveries = Deliveries(outbox, capacity=config.max_deliveries)
    await deliveries.load()
    mesh.keep(coordinator_address)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        market = _GatewayMarket(
            mesh, signer, coordinator, deliveries, config, clock=clock, nursery=nursery
        )
        nursery.start_soon(deliveries.keep)
        nursery.start_soon(keep_session, mesh, coordinator, MARKET, market.coordinator.serve)
        try:
            yield market
        except Exception as exc:  # noqa: BLE001 - whatever the caller's body raised
            failure = exc  # raised again outside the nursery, which would wrap it
        finally:
            await market.leave()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _GatewayMarket:
    """Implements `jobs.Market`; made by `open_market`."""

    def __init__(  # noqa: PLR0913 - its parts
        self,
        mesh: Mesh,
        signer: Signer,
        coordinator: PeerId,
        deliveries: Deliveries,
        config: MarketConfig,
        *,
        clock: Callable[[], UnixMilliseconds],
        nursery: trio.Nursery,
    ) -> None:
        self._signer: Final = signer
        self._peer: Final = coordinator
        self._deliveries: Final = deliveries
        self._config: Final = config
        self._nursery: Final = nursery
        self._links: Final = ProviderLinks(
            mesh, signer, nursery, max_links=config.max_links, linger=config.linger
        )
        self.coordinator: Final = CoordinatorLink(
            mesh,
            deliveries,
            clock=clock,
            on_roster=self._follow,
            hand_back=self._hand_back,
        )
        self._log: Final = LogClient(mesh, coordinator)
        self._buyer: Final = Buyer(signer.peer_id, self._links, config, self.coordinator.now)
        self._is_open = True
        self._running = 0
        self._finished = 0
        self._failovers = 0
        self._signing = 0
        self._all_signed = trio.Event()
        self._last_auction_ms: int | None = None

    # --- jobs.Market ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def buy(self, order: JobOrder) -> AsyncIterator[Job]:
        """See `jobs.Market.buy`."""
        purchase = await self._auction(order)
        self._running += 1
        try:
            await purchase.begin()
            yield purchase
        finally:
            purchase.stop()
            self._running -= 1
            self._finished += 1
            self._failovers += purchase.failovers
            self._start_signing(partial(self._conclude, purchase), order.request_id)

    def providers(self) -> Sequence[ProviderView]:
        """See `jobs.Market.providers`."""
        return tuple(
            ProviderView(
                peer=entry.peer,
                addresses=entry.addresses,
                models=entry.models,
                connected=self._links.is_open(entry.peer),
            )
            for entry in self.coordinator.providers
        )

    async def receipt(self, request_id: RequestId, *, wait_ms: Milliseconds) -> ReceiptReply:
        """See `jobs.Market.receipt`."""
        give_up_at = trio.current_time() + wait_ms / 1000
        while True:
            reply = await self._log.receipt(request_id)
            left = give_up_at - trio.current_time()
            if reply.receipt is not None or left <= 0:
                return reply
            with trio.move_on_after(min(left, _RECEIPT_POLL)):
                await self.coordinator.wait_receipt(request_id)

    async def bid_set(self, request_id: RequestId) -> tuple[bytes, ...] | None:
        """See `jobs.Market.bid_set`."""
        return await self._log.bid_set(request_id)

    def statistics(self) -> MarketStatistics:
        """See `jobs.Market.statistics`."""
        return MarketStatistics(
            coordinator_connected=self.coordinator.is_connected,
            balance=self.coordinator.balance,
            jobs_running=self._running,
            jobs_finished=self._finished,
            failovers=self._failovers,
            deliveries_waiting=len(self._deliveries),
            last_auction_ms=self._last_auction_ms,
        )

    # --- its parts --------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Buy nothing more, and wait for what is being signed; cancellation does not cut it."""
        self._is_open = False
        with trio.move_on_after(self._config.leave_timeout) as scope:
            scope.shield = True
            while self._signing:
                self._all_signed = trio.Event()
                await self._all_signed.wait()
        self._log.close()

    async def _auction(self, order: JobOrder) -> Purchase:
        started = trio.current_time()
        request = job_request(order, now=self.coordinator.now())
        answer = await self._ask(request)
        repeats = 0
        while _is_worth_repeating(answer) and repeats < self._config.auction_repeats:
            repeats += 1
            # Until the first offer has closed, providers take the second for its echo.
            await trio.sleep(self.coordinator.auction_window + _AFTER_THE_CLOSE)
            answer = await self._ask(request)
        if isinstance(answer, JobRefused):
            raise _refusal(answer, order, self.coordinator.providers)
        try:
            assignments = open_award_untrusted(
                answer, request, coordinator=self._peer, gateway=self._signer.peer_id
            )
        except RemoteProtocolError as exc:
            logger.warning("the coordinator made a bad award for %s: %s", order.request_id, exc)
            self._hand_back(order.request_id)
            raise CoordinatorUnreachable(f"the coordinator broke the protocol: {exc}") from exc
        deadline = started + order.deadline_in / 1000
        return Purchase(order, assignments, self._buyer, deadline=deadline)

    async def _ask(self, request: JobRequest) -> Award | JobRefused:
        started = trio.current_time()
        answer = await self.coordinator.ask(request, timeout=self._config.auction_timeout)
        self._last_auction_ms = round(1000 * (trio.current_time() - started))
        return answer

    def _follow(self, roster: Roster) -> None:
        self._links.follow(entry for entry in roster.entries if entry.role is Role.PROVIDER)

    def _hand_back(self, request_id: RequestId) -> None:
        """Sign that nothing was delivered, so that the hold of an award is not kept for long."""
        delivery = Delivery(
            request_id=request_id,
            gateway=self._signer.peer_id,
            segments=(),
            outcome=Outcome.CANCELLED,
            output_hash=digest_of(b""),
        )
        envelope = self._signer.seal(delivery)
        self._start_signing(partial(self._deliveries.add, request_id, envelope), request_id)

    async def _conclude(self, purchase: Purchase) -> None:
        await purchase.wait_over()
        envelope = self._signer.seal(purchase.delivery())
        await self._deliveries.add(purchase.order.request_id, envelope)

    def _start_signing(self, work: Callable[[], Awaitable[None]], request_id: RequestId) -> None:
        if not self._is_open and not self._signing:
            logger.warning("left the market before %s was signed for", request_id)
            return
        self._signing += 1
        self._nursery.start_soon(self._sign, work, request_id)

    async def _sign(self, work: Callable[[], Awaitable[None]], request_id: RequestId) -> None:
        """The edge of one delivery: leaving does not cut it short, and its failure stays here."""
        try:
            with trio.move_on_after(self._config.leave_timeout) as scope:
                scope.shield = True
                await work()
            if scope.cancelled_caught:
                logger.warning("the delivery of %s took too long to be stored", request_id)
        except Exception:
            logger.exception("the delivery of %s failed", request_id)
        finally:
            self._signing -= 1
            if not self._signing:
                self._all_signed.set()


def _is_worth_repeating(answer: Award | JobRefused) -> bool:
    """Whether nobody bid, but somebody may within the second: a burst fills all places at once."""
    return (
        isinstance(answer, JobRefused)
        and answer.reason is RefusalReason.NO_BIDS
        and answer.retry_after_ms is not None
    )


def _refusal(refused: JobRefused, order: JobOrder, providers: Sequence[RosterEntry]) -> JobError:
    """The coordinator's refusal, as an error of the job."""
    needed = order.input_estimate + order.output_limit
    windows = [
        offer.context_window
        for entry in providers
        for offer in entry.models
        if offer.model == order.model
    ]
    is_about_room = refused.reason in (RefusalReason.NO_BIDS, RefusalReason.NOBODY_ELIGIBLE)
    if is_about_room and windows and max(windows) < needed:
        return jobs.PromptTooLong(
            f"about {order.input_estimate} tokens of prompt and up to {order.output_limit} of "
            "answer do not fit"
        )
    return _ERRORS[refused.reason](refused.explanation, retry_after_ms=refused.retry_after_ms)
