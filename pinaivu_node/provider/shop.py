"""The provider's one place of record: what is for sale, what runs, what was earned.

The market's side and the gateways' side both work on it; nothing here awaits, so every method is
one step that no other task can come between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

import trio

from pinaivu_node.engine.fleet.residency import Residence
from pinaivu_node.engine.types import GenerationRequest, TokenEvent
from pinaivu_node.protocol.ids import (
    Milliseconds,
    ModelName,
    NanoX,
    PeerId,
    RequestId,
    UnixMilliseconds,
)
from pinaivu_node.protocol.inference import Dispatch, Done, Refuse, RefuseReason
from pinaivu_node.protocol.market import (
    Announce,
    Bid,
    DispatchToken,
    JobOffer,
    ModelLoad,
    Pass,
    PassReason,
    Welcome,
)
from pinaivu_node.protocol.receipt import Receipt
from pinaivu_node.protocol.signing import Signer
from pinaivu_node.provider.bidding import Seller, answer_offer
from pinaivu_node.provider.config import ProviderConfig
from pinaivu_node.provider.dispatch import Doorkeeper, check_dispatch_untrusted, refusal
from pinaivu_node.provider.jobs import Ending, Job, generation_of
from pinaivu_node.provider.proofs import ProofSpool, UnpaidProofs
from pinaivu_node.provider.seen import SeenRequests
from pinaivu_node.provider.shelf import ServedModel, Stock, ready_offers, stock_of
from pinaivu_node.provider.statistics import (
    FinishedJob,
    ModelStatistics,
    ProviderStatistics,
    RunningJob,
    Tally,
)
from pinaivu_node.provider.warmth import Chain, Warmth

logger = logging.getLogger(__name__)

Clock = Callable[[], UnixMilliseconds]

_REMEMBERED: Final = 65_536
"""Offers answered and tokens used: ten seconds of six thousand a second, and some 10 MB."""

_SETTLED_IS_REMEMBERED: Final = 60_000
"""Milliseconds; a dispatch token lives a sixth of it."""


class Shop:
    """State of one provider; see the module."""

    def __init__(
        self,
        signer: Signer,
        coordinator: PeerId,
        served: Mapping[ModelName, ServedModel],
        config: ProviderConfig,
        *,
        clock: Clock,
    ) -> None:
        self.me = signer.peer_id
        self.coordinator = coordinator
        self.config = config
        self.served = served
        spool = None if config.proofs_folder is None else ProofSpool(config.proofs_folder)
        self.proofs = UnpaidProofs(spool, capacity=config.max_proofs)
        self.tally = Tally()
        self.draining = False
        self.connected = False
        self.gateways = 0
        """Inference streams open; counted by whoever serves them."""
        self.news = trio.Event()
        """Set when the coordinator should hear of us before the next heartbeat; see `hear_news`."""
        self._signer = signer
        self._clock = clock
        self._welcome: Welcome | None = None
        self._ahead_ms = 0
        """How far the coordinator's clock is ahead of ours."""
        self._first_issue: UnixMilliseconds | None = None
        self._jobs: dict[RequestId, Job] = {}
        self._stops: dict[RequestId, Callable[[], None]] = {}
        self._running: dict[ModelName, int] = dict.fromkeys(served, 0)
        self._without_room: set[ModelName] = set()
        """What the coordinator was told to be full because other models take the memory."""
        notice_s = config.bid_validity_ms / 1000
        self._warmth = {model: Warmth(notice_s=notice_s) for model in served}
        self._answered = SeenRequests(_REMEMBERED)
        self._used = SeenRequests(_REMEMBERED)

    def now(self) -> UnixMilliseconds:
        """The time on the coordinator's clock, on which every deadline is read."""
        return UnixMilliseconds(self._clock() + self._ahead_ms)

    # --- towards the coordinator ------------------------------------------------------------------

    def welcomed(self, welcome: Welcome) -> None:
        """A session with the coordinator is up; this is its clock and its policy."""
        self._welcome = welcome
        self._ahead_ms = welcome.now - self._clock()
        # The earliest counts: should the coordinator's clock be set back, its new tokens are not
        # to be taken for those of an earlier life of ours.
        self._first_issue = min(self._first_issue or welcome.now, welcome.now)
        self.connected = True
        self.proofs.start_over()

    def announcement(self) -> Announce:
        """What we sell now."""
        return Announce(models=ready_offers(self._stock()), draining=self.draining)

    def loads(self) -> tuple[ModelLoad, ...]:
        """How busy each announced model is; what waits in an engine is not running."""
        stocked = self._stock()
        self._without_room = {name for name, stock in stocked.items() if not stock.has_room}
        return tuple(
            ModelLoad(
                model=model,
                # Without room in memory it is as full as with all its places taken.
                running=min(stock.running, stock.offer.capacity)
                if stock.has_room
                else stock.offer.capacity,
                queued=max(0, -stock.free),
            )
            for model, stock in sorted(stocked.items())
            if stock.ready
        )

    def answer(self, offer: JobOffer) -> Bid | Pass | None:
        """What to say to a verified offer; it is counted, and will not be answered twice."""
        self.tally.offers += 1
        now = self.now()
        seller = Seller(
            me=self.me,
            stock=self._stock(),
            draining=self.draining,
            price_ceiling=None if self._welcome is None else self._welcome.policy.price_ceiling,
            answered=self._answered,
            bid_validity=self.config.bid_validity_ms,
            warm_tokens=self._warm_tokens(offer),
            max_delay=Milliseconds(min(self.config.max_delay_ms, offer.terms.deadline - now)),
        )
        answer = answer_offer(offer, seller, now=now)
        request_id = offer.terms.request_id
        if answer is None or not self._answered.add(request_id, until=offer.closes_at, now=now):
            return None
        if isinstance(answer, Bid):
            self.tally.bids += 1
        else:
            self.tally.passes[answer.reason] += 1
            if answer.reason is PassReason.ENGINE_UNAVAILABLE:
                self._anticipate(offer.terms.model)
        return answer

    def receipted(self, receipt: Receipt) -> None:
        """A verified receipt: the proof has done its work, or there is nothing more to earn."""
        if not self.proofs.settle(receipt.request_id):
            self._give_up(receipt)
            return
        mine = sum(each.amount for each in receipt.segments if each.provider == self.me)
        # The fee is kept in the same proportion from every segment.
        fee = receipt.fee * mine // receipt.amount if receipt.amount else 0
        self.tally.earn(receipt.request_id, NanoX(mine - fee))

    def _give_up(self, receipt: Receipt) -> None:
        """Stop and refuse a job that was settled without our proof.

        Its gateway said that nothing came from us, or that it is done; no token from here on would
        be paid.  A repeated receipt, or one about a job of others, finds nothing to stop.
        """
        until = UnixMilliseconds(receipt.settled_at + _SETTLED_IS_REMEMBERED)
        self._used.add(receipt.request_id, until=until, now=self.now())
        stop = self._stops.get(receipt.request_id)
        if stop is not None:
            logger.warning("job %s was settled while it ran here", receipt.request_id)
            stop()

    async def hear_news(self, timeout: float) -> None:
        """Wait until there is something that the coordinator should know, or the time is over."""
        with trio.move_on_after(timeout):
            await self.news.wait()
        self.news = trio.Event()

    def drain(self, *, draining: bool) -> None:
        """Take no new jobs, or take them again; what runs goes on."""
        self.draining = draining
        self.news.set()

    # --- towards gateways -------------------------------------------------------------------------

    def admit_untrusted(self, dispatch: Dispatch, *, sender: PeerId, jobs: int) -> Job | Refuse:
        """Open the account of a job, or say why not; `jobs` are what this gateway has running."""
        now = self.now()
        door = Doorkeeper(
            me=self.me,
            coordinator=self.coordinator,
            stock=self._stock(),
            used=self._used,
            # Before the first Welcome we have bid on nothing, so no token can be meant for us.
            first_issue=self._first_issue or UnixMilliseconds(now + 1),
            max_queued=self.config.max_queued,
            max_prompt_characters=self.config.max_prompt_characters,
            places_of_gateway=self.config.max_jobs_per_gateway - jobs,
            draining=self.draining,
        )
        token = check_dispatch_untrusted(dispatch, door, sender=sender, now=now)
        if isinstance(token, DispatchToken) and not self._used.add(
            token.request_id, until=token.expires_at, now=now
        ):
            token = refusal(token.request_id, RefuseReason.FULL, "too many tokens to remember")
        if isinstance(token, Refuse):
            self.tally.refusals[token.reason] += 1
            return token
        job = Job(dispatch, token, now=trio.current_time())
        self._jobs[token.request_id] = job
        self._running[token.model] += 1
        return job

    def must_be_loaded(self, job: Job) -> bool:
        """Whether the job's model is not there yet."""
        on_demand = self.served[job.token.model].on_demand
        return on_demand is not None and on_demand.standing().residence is not Residence.WARM

    def stopped_by(self, job: Job, stop: Callable[[], None]) -> None:
        """How to stop this job while it runs; forgotten when its account is closed."""
        self._stops[job.request_id] = stop

    def generation(self, job: Job, dispatch: Dispatch) -> GenerationRequest:
        """What the job's engine is to do."""
        return generation_of(dispatch, deadline_ms=self.time_left(job))

    def time_left(self, job: Job) -> Milliseconds:
        """Until nobody works on this job any more."""
        return Milliseconds(max(0, job.token.deadline - self.now()))

    def computed(self, job: Job, event: TokenEvent) -> None:
        """An engine has brought something for a job."""
        now = trio.current_time()
        was_read = job.is_read
        job.computed(event, now=now)
        if job.is_read and not was_read:
            model = job.token.model
            engine = self.served[model].engine.statistics()
            resumed = job.resumed_tokens
            self._warmth[model].computed(job.chain, event, engine, resumed=resumed, now=now)

    def accepted(self) -> None:
        """The engine has taken a job: it will end with a proof."""
        self.tally.won += 1

    def leave_engine(self, job: Job) -> None:
        """The job's place in the engine is free again."""
        model = job.token.model
        was_full = self._running[model] >= self.served[model].engine.statistics().capacity
        self._running[model] -= 1
        if job.is_read:
            self._warmth[model].used(job.chain, now=trio.current_time())
        if was_full or self._makes_room():
            # The auction would not wait for the bid of one that it takes for full.
            self.news.set()

    def turned_away(self, job: Job, reason: RefuseReason, explanation: str) -> Refuse:
        """The engine would not take the job after all: close its account, unsigned."""
        del self._jobs[job.request_id]
        self._stops.pop(job.request_id, None)
        self.tally.refusals[reason] += 1
        return refusal(job.request_id, reason, explanation)

    def seal(self, job: Job, ending: Ending) -> Done:
        """Close a job's account: sign the proof, see that it gets paid, and make the last word."""
        del self._jobs[job.request_id]
        self._stops.pop(job.request_id, None)
        proof = job.proof(ending, me=self.me, now=trio.current_time())
        envelope = self._signer.seal(proof)
        self.proofs.add(job.request_id, envelope)
        self.tally.finish(
            FinishedJob(job.request_id, job.token.model, proof.usage.output, ending.finish)
        )
        return Done(
            request_id=job.request_id,
            finish=ending.finish,
            proof=envelope,
            explanation=ending.explanation[:300],
        )

    # --- for whoever looks ------------------------------------------------------------------------

    def statistics(self) -> ProviderStatistics:
        """A snapshot, at once."""
        tally, now = self.tally, trio.current_time()
        return ProviderStatistics(
            peer_id=self.me,
            coordinator=self.coordinator,
            connected=self.connected,
            draining=self.draining,
            models=tuple(self._model_statistics(model) for model in sorted(self.served)),
            running=tuple(_running_job(job, now=now) for job in self._jobs.values()),
            last_jobs=tuple(reversed(tally.last_jobs.values())),
            offers=tally.offers,
            bids=tally.bids,
            won=tally.won,
            finished=tally.finished,
            passes=dict(tally.passes),
            refusals=dict(tally.refusals),
            rejected_messages=tally.rejected_messages,
            tokens_served=tally.tokens_of_finished
            + sum(job.output_tokens for job in self._jobs.values()),
            earnings=NanoX(tally.earnings),
            unpaid_proofs=len(self.proofs),
            gateways=self.gateways,
        )

    def _model_statistics(self, model: ModelName) -> ModelStatistics:
        engine = self.served[model].engine.statistics()
        on_demand = self.served[model].on_demand
        return ModelStatistics(
            model=model,
            ready=engine.ready,
            running=self._running[model],
            capacity=engine.capacity,
            device=engine.device,
            tokens_per_second=engine.tokens_per_second,
            kv_blocks=engine.kv_blocks,
            kv_blocks_free=engine.kv_blocks_free,
            input_tokens=engine.input_tokens,
            cached_tokens=engine.cached_tokens,
            warm_prefixes=len(self._warmth[model]),
            load_progress=engine.load_progress,
            standing=None if on_demand is None else on_demand.standing(),
        )

    def _anticipate(self, model: ModelName) -> None:
        served = self.served.get(model)
        if served is not None and served.on_demand is not None:
            served.on_demand.anticipate()

    def _makes_room(self) -> bool:
        """Whether a model that there was no memory for could be loaded now."""
        waiting = (self.served[model].on_demand for model in self._without_room)
        return any(each is not None and each.standing().has_room for each in waiting)

    def _warm_tokens(self, offer: JobOffer) -> int:
        served = self.served.get(offer.terms.model)
        if served is None or not offer.fingerprints:
            return 0
        chain = Chain(offer.gateway, offer.fingerprints)
        warmth, engine = self._warmth[served.model], served.engine.statistics()
        return warmth.warm_tokens(offer.terms.request_id, chain, engine, now=trio.current_time())

    def _stock(self) -> dict[ModelName, Stock]:
        return {
            model: stock_of(served, running=self._running[model])
            for model, served in self.served.items()
        }


def _running_job(job: Job, *, now: float) -> RunningJob:
    return RunningJob(
        request_id=job.request_id,
        model=job.token.model,
        gateway=job.token.gateway,
        tokens=job.output_tokens,
        tokens_per_second=job.speed(now=now),
    )
