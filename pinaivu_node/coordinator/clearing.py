"""Follows every awarded job to its receipt.

Durable, then true, then told: a receipt is written with its postings in one transaction, then the
measurements count, then gateway and providers are sent it.  Peers repeat Proof and Delivery until
they have a receipt, so nothing that was not settled needs to be kept here.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import trio

from pinaivu_node.coordinator.auction import decide, open_bid_set_untrusted, wait_share
from pinaivu_node.coordinator.floor import Floor
from pinaivu_node.coordinator.job import Contract, Job
from pinaivu_node.coordinator.ledger import settle_entry
from pinaivu_node.coordinator.reputation import Subject, Track, is_measured
from pinaivu_node.coordinator.settlement import Bill, bill, receipt_for
from pinaivu_node.coordinator.store import Settlement, StoredJob, StoreError
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId, RequestId, UnixMilliseconds, digest_of
from pinaivu_node.protocol.market import (
    Acknowledge,
    Award,
    Bid,
    Delivery,
    DispatchToken,
    Proof,
)
from pinaivu_node.protocol.merkle import tree_root
from pinaivu_node.protocol.receipt import BidSetReply, ReceiptReply
from pinaivu_node.protocol.signing import Envelope, Signer, open_untrusted
from pinaivu_node.protocol.wire import decode_untrusted, encode, encode_body

logger = logging.getLogger(__name__)


class Clearing:
    """The jobs that were awarded and have no receipt yet."""

    def __init__(self, floor: Floor, nursery: trio.Nursery) -> None:
        self._floor = floor
        self._nursery = nursery
        self._jobs: dict[RequestId, Job] = {}
        self._per_gateway: Counter[PeerId] = Counter()
        self._being_settled: set[RequestId] = set()

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._jobs

    def open_jobs_of(self, gateway: PeerId) -> int:
        """How many jobs of this gateway have no receipt yet."""
        return self._per_gateway[gateway]

    def add(self, contract: Contract) -> None:
        """A job was awarded, durably."""
        self._jobs[contract.terms.request_id] = Job(contract)
        self._per_gateway[contract.gateway] += 1

    async def recover(self) -> None:
        """Take up the jobs that an earlier life of this coordinator left open."""
        for stored in await self._floor.store.open_jobs():
            try:
                self.add(restored(stored, self._floor.signer))
            except (RemoteProtocolError, ValueError, KeyError):
                # Its hold stays, which loses nobody's money; the others must not wait for it.
                logger.exception("a stored job cannot be read and is left alone")
        if self._jobs:
            logger.info("%d jobs of an earlier life wait for their receipts", len(self._jobs))

    async def take_untrusted(
        self, sender: PeerId, message: Proof | Delivery, envelope: Envelope
    ) -> None:
        """Take in what a peer says of a job, and settle the job if that was all.

        A job that is settled is answered with its receipt; one that never was, with Acknowledge.
        Raises RemoteProtocolError where the statement does not belong to the job.
        """
        job = self._jobs.get(message.request_id)
        if job is None:
            await self._answer_again(sender, message.request_id)
            return
        if message.request_id in self._being_settled:
            return  # the receipt is on its way
        now = self._floor.clock()
        if isinstance(message, Proof):
            job.add_proof_untrusted(message, envelope, sender=sender, now=now)
            self._release(job, sender, ran=True)
        else:
            job.add_delivery_untrusted(message, envelope, sender=sender, now=now)
            for award in job.contract.awards:
                self._release(job, award.provider, ran=False)
        if job.is_matched():
            self._begin(job)

    def settle_due(self) -> None:
        """Settle what has waited long enough for a statement that did not come."""
        now = self._floor.clock()
        for job in self._jobs.values():
            if job.request_id not in self._being_settled and self._settle_at(job) <= now:
                self._begin(job)

    def _settle_at(self, job: Job) -> UnixMilliseconds:
        return job.settle_at(
            grace_ms=self._floor.config.settlement_grace_ms,
            gateway_is_here=self._floor.sessions.remembers(
                job.contract.gateway, job.contract.incarnation
            ),
        )

    async def _answer_again(self, sender: PeerId, request_id: RequestId) -> None:
        try:
            known = await self._floor.store.receipt_reply(request_id)
        except StoreError:
            logger.exception("cannot look up the receipt of %s", request_id)
            return  # it will be asked for again
        receipt = decode_untrusted(known, ReceiptReply).receipt if known else None
        self._floor.sessions.say(
            sender,
            receipt or Acknowledge(request_id=request_id, explanation="no such job was awarded"),
        )

    def _begin(self, job: Job) -> None:
        """From now on the job hears nothing: its receipt is being written."""
        self._being_settled.add(job.request_id)
        self._nursery.start_soon(self._settle, job)

    async def _settle(self, job: Job) -> None:
        """Write, believe and tell the receipt; on a failing database, at a later sweep.

        Any other failure is a bug.  The job is then left alone until the next start: its hold
        stays, which loses nobody's money, and the other jobs go on.
        """
        try:
            final, now = bill(job), self._floor.clock()
            tracks = self._tracks(job, now)
            reply = await self._floor.store.settle(self._settlement(job, final, tracks, now=now))
            for subject, track in tracks.items():
                self._floor.reputation.learn(subject, track)
            self._close(job, final)
            self._tell(job, reply)
        except StoreError:
            logger.exception("cannot settle %s; it will be tried again", job.request_id)
        except Exception:
            logger.exception("the settlement of %s failed", job.request_id)
            return
        self._being_settled.discard(job.request_id)

    def _settlement(
        self, job: Job, final: Bill, tracks: dict[Subject, Track], *, now: UnixMilliseconds
    ) -> Settlement:
        contract = job.contract
        return Settlement(
            request_id=job.request_id,
            entry=settle_entry(
                contract.gateway, job.request_id, hold=contract.hold, shares=final.shares
            ),
            receipt_reply=partial(self._signed_reply, contract, final, now),
            tracks=tracks,
            settled_at=now,
        )

    def _signed_reply(
        self, contract: Contract, final: Bill, now: UnixMilliseconds, ledger_entry: int
    ) -> bytes:
        receipt = receipt_for(
            contract,
            final,
            coordinator=self._floor.signer.peer_id,
            ledger_entry=ledger_entry,
            now=now,
        )
        return encode(
            ReceiptReply(
                request_id=contract.terms.request_id,
                receipt=self._floor.signer.seal(receipt),
                proofs=final.proofs,
                delivery=final.delivery,
            )
        )

    def _tracks(self, job: Job, now: UnixMilliseconds) -> dict[Subject, Track]:
        """What will be known of the providers once this job is settled."""
        if job.delivery is None:
            return {}  # nobody measured anything
        reports = job.delivery.message.segments
        awards = ((report, job.contract.award_of(report.provider)) for report in reports)
        return {
            subject: self._floor.reputation.after(
                subject,
                report,
                now=now,
                wait_share=wait_share(job.contract.terms, warm_tokens=award.warm_tokens),
                delay_ms=award.delay_ms,
            )
            for report, award in awards
            if award is not None and is_measured(report, proven=report.provider in job.proofs)
            for subject in [Subject(award.provider, award.model_digest)]
        }

    def _close(self, job: Job, final: Bill) -> None:
        job.settle()
        del self._jobs[job.request_id]
        self._per_gateway[job.contract.gateway] -= 1
        if not self._per_gateway[job.contract.gateway]:
            del self._per_gateway[job.contract.gateway]
        self._floor.tally.settlements[final.outcome] += 1
        for award in job.contract.awards:
            self._release(job, award.provider, ran=False)

    def _tell(self, job: Job, reply: bytes) -> None:
        receipt = decode_untrusted(reply, ReceiptReply).receipt
        assert receipt is not None  # noqa: S101 - we have just written it
        frame = encode(receipt)
        for peer in (job.contract.gateway, *(award.provider for award in job.contract.awards)):
            self._floor.sessions.send(peer, frame)

    def _release(self, job: Job, provider: PeerId, *, ran: bool) -> None:
        self._floor.market.release(provider, job.contract.terms.model, job.request_id, ran=ran)


def restored(stored: StoredJob, signer: Signer) -> Contract:
    """A contract from what was kept of it: its bid set, decided again, and its award."""
    award = decode_untrusted(stored.award, Award)
    leaves = decode_untrusted(stored.bid_set, BidSetReply).leaves or ()
    record, answers = open_bid_set_untrusted(leaves)
    tokens = {
        open_untrusted(each, DispatchToken, signer=signer.peer_id).provider: each.digest
        for each in award.tokens
    }
    bids = sum(isinstance(answer.message, Bid) for answer in answers)
    return Contract(
        terms=record.terms,
        gateway=record.gateway,
        policy=record.policy,
        policy_hash=digest_of(encode_body(record.policy)),
        awards=decide(record, answers).awards,
        tokens=tokens,
        bid_set_root=tree_root(leaves),
        bids=bids,
        passes=len(answers) - bids,
        hold=stored.hold,
        opened_at=record.opened_at,
        awarded_at=stored.awarded_at,
    )
