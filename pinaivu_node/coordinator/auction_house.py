"""Holds auctions: a JobRequest in, an Award or a JobRefused out.

The balance of a gateway that is not known to be good for it is looked up first; when the auction
has closed, the hold, the award and the bid set become durable in one transaction; only then is
the Award sent.  An auction that does not come to an award leaves no trace in the books, so there
is nothing to repair after a crash.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

import trio

from pinaivu_node.coordinator import refusal
from pinaivu_node.coordinator.auction import (
    AuctionResult,
    RankedAward,
    bid_set_leaves,
    decide,
)
from pinaivu_node.coordinator.clearing import Clearing
from pinaivu_node.coordinator.floor import Floor
from pinaivu_node.coordinator.job import Contract, hold_for
from pinaivu_node.coordinator.ledger import OverdraftError, hold_entry
from pinaivu_node.coordinator.open_auction import ClosedAuction, Invitation, OpenAuction, Standing
from pinaivu_node.coordinator.reputation import Subject
from pinaivu_node.coordinator.store import DuplicateJobError, NewJob, StoreError
from pinaivu_node.mesh.mesh import Mesh
from pinaivu_node.protocol.draw import draw, threshold_for
from pinaivu_node.protocol.errors import PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import (
    Digest,
    Milliseconds,
    PeerId,
    RequestId,
    UnixMilliseconds,
    digest_of,
)
from pinaivu_node.protocol.market import (
    Award,
    Bid,
    DispatchToken,
    JobOffer,
    JobRefused,
    JobRequest,
    ModelOffer,
    Pass,
)
from pinaivu_node.protocol.merkle import tree_root
from pinaivu_node.protocol.receipt import BidSetReply
from pinaivu_node.protocol.signing import Envelope
from pinaivu_node.protocol.topics import jobs_topic
from pinaivu_node.protocol.wire import encode

logger = logging.getLogger(__name__)

Clock = Callable[[], UnixMilliseconds]


class _Running:
    """One auction and those who wait for its end."""

    def __init__(
        self, auction: OpenAuction, gateway: PeerId, offers: dict[PeerId, ModelOffer]
    ) -> None:
        self.auction: Final = auction
        self.gateway: Final = gateway
        self.offers: Final = offers
        self._changed = trio.Event()

    def wake(self) -> None:
        """The auction may be over."""
        self._changed.set()

    async def wait_closed(self, clock: Clock) -> None:
        """Return when the auction is to be closed."""
        # The wall clock dates the bids; one that is set back must not make an auction wait.
        with trio.move_on_after((self.auction.last_call - self.auction.opened_at) / 1000):
            while True:
                left = self.auction.close_time() - clock()
                if left <= 0:
                    return
                with trio.move_on_after(left / 1000):
                    await self._changed.wait()
                self._changed = trio.Event()


class AuctionHouse:
    """Every running auction."""

    def __init__(self, mesh: Mesh, floor: Floor, clearing: Clearing) -> None:
        self._mesh = mesh
        self._floor = floor
        self._clearing = clearing
        self._running: dict[RequestId, _Running] = {}
        self._solvent: set[PeerId] = set()
        """Gateways here whose last award the books carried; the next is trusted to be carried."""
        self._per_gateway: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return len(self._running)

    async def hold(self, gateway: PeerId, request: JobRequest) -> None:
        """Hold one auction, from the request to the answer that is sent to its gateway."""
        self._floor.tally.requests += 1
        started = self._floor.clock()
        answer = await self._answer(gateway, request)
        match answer:
            case JobRefused():
                self._floor.tally.refusals[answer.reason] += 1
                self._floor.sessions.say(gateway, answer)
            case Award():
                self._floor.tally.award(self._floor.clock() - started)
                self._floor.sessions.say(gateway, answer)
            case None:
                logger.debug("%s left before its auction closed", gateway)

    def add_answer_untrusted(self, sender: PeerId, message: Bid | Pass, envelope: Envelope) -> None:
        """Hand a bid or a pass to its auction.  RemoteProtocolError if it cannot be taken."""
        running = self._running.get(message.request_id)
        if running is None:
            raise RemoteProtocolError("there is no such auction", action=PeerAction.IGNORE)
        if not self._floor.market.sells(sender, running.auction.request.terms.model):
            raise RemoteProtocolError(
                f"{sender} does not sell this model", action=PeerAction.IGNORE
            )
        # One that came after the opening may answer too; its offer then is the one it has now.
        announced = running.offers.get(sender) or self._floor.market.offer(
            sender, running.auction.request.terms.model
        )
        if isinstance(message, Bid) and announced and message.model_digest != announced.digest:
            # Under another digest it would begin with a clean record whenever it likes.
            raise RemoteProtocolError(
                f"{sender} bids with other weights than it announced", action=PeerAction.IGNORE
            )
        auction = running.auction
        before = auction.close_time()
        auction.add_answer_untrusted(message, envelope, sender=sender, now=self._floor.clock())
        if auction.close_time() != before:
            running.wake()

    def forget(self, peer: PeerId) -> None:
        """A peer has left: no auction waits for it, and what it may owe is looked up again."""
        self._solvent.discard(peer)
        for running in self._running.values():
            running.auction.forget(peer)
            if running.auction.is_complete():
                running.wake()

    # --- one auction --------------------------------------------------------------------------

    async def _answer(self, gateway: PeerId, request: JobRequest) -> Award | JobRefused | None:
        """The answer to a request; None if its gateway is gone."""
        running = self._open(gateway, request)
        if isinstance(running, JobRefused):
            return running
        request_id = request.terms.request_id
        self._running[request_id] = running
        self._per_gateway[gateway] += 1
        try:
            if gateway not in self._solvent:
                refused = await self._look_into_the_books(running)
                if refused is not None:
                    return refused
            await self._publish(running)
            await running.wait_closed(self._floor.clock)
            return await self._close(running)
        finally:
            del self._running[request_id]
            self._per_gateway[gateway] -= 1
            if not self._per_gateway[gateway]:
                del self._per_gateway[gateway]

    def _open(self, gateway: PeerId, request: JobRequest) -> _Running | JobRefused:
        terms, now = request.terms, self._floor.clock()
        fault = self._overload(gateway, request) or refusal.fault_of_terms(
            terms, self._floor.config, now=now
        )
        if fault is not None:
            return fault
        if terms.request_id in self._running or terms.request_id in self._clearing:
            return refusal.duplicate(terms)
        found = refusal.candidates(request, self._floor.market)
        if isinstance(found, JobRefused):
            return found
        auction = OpenAuction(
            request, self._invite(request, found), policy=self._floor.config.policy, opened_at=now
        )
        return _Running(auction, gateway, found)

    def _overload(self, gateway: PeerId, request: JobRequest) -> JobRefused | None:
        if len(self._running) >= self._floor.config.max_auctions:
            return refusal.overloaded(request.terms, "too many auctions are running")
        jobs = self._per_gateway[gateway] + self._clearing.open_jobs_of(gateway)
        if jobs >= self._floor.config.max_open_jobs:
            return refusal.overloaded(request.terms, f"this gateway has {jobs} jobs open")
        return None

    def _invite(self, request: JobRequest, found: dict[PeerId, ModelOffer]) -> Invitation:
        terms, now, market = request.terms, self._floor.clock(), self._floor.market
        draws = {peer: draw(peer, terms.request_id) for peer in found}
        threshold = threshold_for(bid_target=self._floor.config.policy.bid_target, live=len(found))
        if request.allow is not None:
            # The offer does not say who is allowed: the bound must let each of them through.
            threshold = max(threshold, max(draws.values()) + 1)
        invited = frozenset(peer for peer, drawn in draws.items() if drawn < threshold)
        full = (each for each in invited if market.is_known_full(each, terms.model, now))
        return Invitation(threshold=threshold, providers=invited, full=frozenset(full))

    async def _publish(self, running: _Running) -> None:
        request = running.auction.request
        offer = JobOffer(
            terms=request.terms,
            gateway=running.gateway,
            fingerprints=request.fingerprints,
            threshold=running.auction.threshold,
            closes_at=running.auction.last_call,
        )
        payload = encode(self._floor.signer.seal(offer))
        await self._mesh.publish(jobs_topic(request.terms.model), payload)

    async def _look_into_the_books(self, running: _Running) -> JobRefused | None:
        """Refuse what the transaction at the end would refuse anyway, before anyone is asked.

        Only for a gateway whose last award was not carried: looking takes a thread and time, and
        one that runs out of credit costs a single auction in vain.
        """
        terms = running.auction.request.terms
        hold = hold_for(terms, self._floor.config.policy)
        try:
            prospect = await self._floor.store.prospect(running.gateway, terms.request_id)
        except StoreError:
            logger.exception("cannot look up the account of %s", running.gateway)
            return refusal.overloaded(terms, "the ledger cannot be reached")
        if prospect.is_known:
            return refusal.duplicate(terms)
        if prospect.balance < hold:
            return refusal.no_credit(terms, balance=prospect.balance, hold=hold)
        return None

    async def _close(self, running: _Running) -> Award | JobRefused | None:
        closed = running.auction.close(
            coordinator=self._floor.signer.peer_id,
            gateway=running.gateway,
            now=self._floor.clock(),
            standing=lambda message: self._standing(message, running),
        )
        self._floor.tally.bids += running.auction.bids
        self._floor.tally.passes += running.auction.passes
        result = decide(closed.record, closed.answers)
        if not result.awards:
            passes = [
                each.message.reason for each in closed.answers if isinstance(each.message, Pass)
            ]
            return refusal.no_winner(closed.record.terms, result, passes)
        if not self._floor.sessions.is_here(running.gateway):
            return None
        return await self._award(running, closed, result)

    def _standing(self, message: Bid | Pass, running: _Running) -> Standing:
        bidder, now = message.bidder, self._floor.clock()
        model = running.auction.request.terms.model
        offer = running.offers.get(bidder)
        digest = message.model_digest if isinstance(message, Bid) else offer and offer.digest
        subject = Subject(bidder, digest or digest_of(b""))
        return Standing(
            measurement=self._floor.reputation.measurement(subject, now=now),
            banned=self._floor.banned.get(bidder, 0) > now,
            full=self._floor.market.is_given_away(bidder, model, now),
        )

    async def _award(
        self, running: _Running, closed: ClosedAuction, result: AuctionResult
    ) -> Award | JobRefused:
        """Make the award durable; refuse if the books do not carry it."""
        terms, now = closed.record.terms, self._floor.clock()
        leaves = bid_set_leaves(closed.record, closed.kept)
        root = tree_root(leaves)
        tokens = {
            award.provider: self._floor.signer.seal(self._token(closed, award, root, now))
            for award in result.awards
        }
        contract = self._contract(running, closed, result, root=root, tokens=tokens, now=now)
        award = Award(
            request_id=terms.request_id,
            tokens=tuple(tokens.values()),
            contacts=tuple(self._floor.market.contact(peer) for peer in tokens),
            bids=contract.bids,
            passes=contract.passes,
            auction_ms=Milliseconds(max(0, closed.record.closed_at - closed.record.opened_at)),
        )
        winner = result.awards[0].provider
        # Given away before it is durable: auctions that close meanwhile must not give it again.
        until = UnixMilliseconds(now + self._floor.config.policy.token_ttl_ms)
        self._floor.market.reserve(winner, terms.model, terms.request_id, until)
        refused = await self._keep(contract, award, leaves)
        if refused is not None:
            self._solvent.discard(running.gateway)
            self._floor.market.release(winner, terms.model, terms.request_id, ran=False)
            return refused
        if self._floor.sessions.is_here(running.gateway):  # or nobody would ever take it out
            self._solvent.add(running.gateway)
        self._clearing.add(contract)
        return award

    async def _keep(
        self, contract: Contract, award: Award, leaves: tuple[bytes, ...]
    ) -> JobRefused | None:
        terms = contract.terms
        job = NewJob(
            request_id=terms.request_id,
            gateway=contract.gateway,
            hold=contract.hold,
            hold_entry=hold_entry(contract.gateway, terms.request_id, contract.hold),
            awarded_at=contract.awarded_at,
            award=encode(award),
            bid_set=encode(BidSetReply(request_id=terms.request_id, leaves=leaves)),
        )
        try:
            await self._floor.store.add_job(job)
        except OverdraftError as exc:
            return refusal.no_credit(terms, balance=exc.balance, hold=exc.needed)
        except DuplicateJobError:
            return refusal.duplicate(terms)
        except StoreError:
            logger.exception("cannot keep the award of %s", terms.request_id)
            return refusal.overloaded(terms, "the ledger cannot be written")
        return None

    def _token(
        self, closed: ClosedAuction, award: RankedAward, root: Digest, now: UnixMilliseconds
    ) -> DispatchToken:
        terms = closed.record.terms
        return DispatchToken(
            request_id=terms.request_id,
            provider=award.provider,
            gateway=closed.record.gateway,
            kind_of_job=terms.kind,
            model=terms.model,
            model_digest=award.model_digest,
            rank=award.rank,
            input_limit=terms.input_limit,
            output_limit=terms.output_limit,
            prices=award.prices,
            uplift_ppm=award.uplift_ppm,
            sampling_digest=terms.sampling_digest,
            input_commitment=terms.input_commitment,
            bid_set_root=root,
            policy_hash=self._floor.policy_hash,
            issued_at=now,
            expires_at=UnixMilliseconds(
                min(now + self._floor.config.policy.token_ttl_ms, terms.deadline)
            ),
            deadline=terms.deadline,
            delay_ms=award.delay_ms,
        )

    def _contract(
        self,
        running: _Running,
        closed: ClosedAuction,
        result: AuctionResult,
        *,
        root: Digest,
        tokens: dict[PeerId, Envelope],
        now: UnixMilliseconds,
    ) -> Contract:
        terms = closed.record.terms
        return Contract(
            terms=terms,
            gateway=running.gateway,
            policy=self._floor.config.policy,
            policy_hash=self._floor.policy_hash,
            awards=result.awards,
            tokens={peer: envelope.digest for peer, envelope in tokens.items()},
            bid_set_root=root,
            bids=running.auction.bids,
            passes=running.auction.passes,
            hold=hold_for(terms, self._floor.config.policy),
            opened_at=closed.record.opened_at,
            awarded_at=now,
            incarnation=self._floor.sessions.incarnation_of(running.gateway),
        )
