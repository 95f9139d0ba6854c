"""A market that counts: a real implementation of `jobs.Market` with a scripted token source."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import trio

from pinaivu_gateway.jobs import (
    Job,
    JobError,
    JobEvent,
    JobFinished,
    JobOrder,
    MarketStatistics,
    ProviderView,
    TextDelta,
)
from pinaivu_node.protocol.ids import Milliseconds, NanoX, RequestId, digest_of
from pinaivu_node.protocol.inference import Finish, TokenLogprob
from pinaivu_node.protocol.market import JobKind, ModelOffer
from pinaivu_node.protocol.money import PriceList, TokenUsage
from pinaivu_node.protocol.receipt import ReceiptReply
from pinaivu_node.protocol.signing import Signer

MODEL = "smollm2:135m"
DIGEST = digest_of(b"weights")
USAGE = TokenUsage(input=7, cached_input=2, output=4)
PROVIDERS = tuple(Signer(bytes([number]) * 32) for number in (1, 2))


@dataclass(frozen=True)
class Script:
    """What the next jobs do."""

    texts: tuple[str, ...] = ("One", ", two", ", three", ".")
    pause: float = 0.0
    refusal: JobError | None = None
    """Before the first token."""
    breaks: JobError | None = None
    """After the last of `texts`."""
    silence: float = 0.0
    """Before anything comes."""
    finish: Finish = Finish.STOP
    failovers: int = 0
    usage: TokenUsage = USAGE


@dataclass
class Bought:
    """One job, as its market saw it."""

    order: JobOrder
    ending: str = "running"
    over: trio.Event = field(default_factory=trio.Event)


class CountingJob:
    def __init__(self, script: Script, order: JobOrder) -> None:
        self._script = script
        self._answers = order.sampling.n
        self._logprobs = order.sampling.logprobs
        self.provider = PROVIDERS[0].peer_id
        self.model_digest = DIGEST
        self.failovers = script.failovers

    async def events(self) -> AsyncIterator[JobEvent]:
        for number, text in enumerate(self._script.texts):
            for index in range(self._answers):
                yield self._delta(number, text, index)
            if self._script.pause:
                await trio.sleep(self._script.pause)
            else:
                await trio.lowlevel.checkpoint()
        if self._script.breaks is not None:
            raise self._script.breaks
        if self._answers > 1:
            for index in range(self._answers):
                yield TextDelta("", (), index=index, finish=self._script.finish)
        yield JobFinished(finish=self._script.finish, usage=self._script.usage)

    def _delta(self, number: int, text: str, index: int) -> TextDelta:
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._logprobs is not None:
            chosen = (number, text.encode(), -0.5)
            logprobs = (TokenLogprob(chosen=chosen, top=(chosen,) * min(1, self._logprobs)),)
        return TextDelta(text=text, token_ids=(number,), index=index, logprobs=logprobs)


class CountingMarket:
    """Serves one model from two providers."""

    def __init__(self) -> None:
        self.script = Script()
        self.bought: list[Bought] = []
        self.receipts: dict[RequestId, ReceiptReply] = {}
        self.leaves: dict[RequestId, tuple[bytes, ...]] = {}
        self.asked: list[tuple[RequestId, Milliseconds]] = []
        self.unreachable: JobError | None = None
        self.roster: tuple[ProviderView, ...] = roster()
        self.new_job = trio.Event()

    @contextlib.asynccontextmanager
    async def buy(self, order: JobOrder) -> AsyncIterator[Job]:
        script, job = self.script, Bought(order)
        self.bought.append(job)
        self.new_job.set()
        try:
            await trio.sleep(script.silence)
            if script.refusal is not None:
                raise script.refusal
            yield CountingJob(script, order)
            job.ending = "completed"
        except trio.Cancelled:
            job.ending = "cancelled"
            raise
        except JobError:
            job.ending = "failed"
            raise
        finally:
            job.over.set()

    def providers(self) -> Sequence[ProviderView]:
        return self.roster

    async def receipt(self, request_id: RequestId, *, wait_ms: Milliseconds) -> ReceiptReply:
        self.asked.append((request_id, wait_ms))
        await trio.lowlevel.checkpoint()
        if self.unreachable is not None:
            raise self.unreachable
        return self.receipts.get(request_id, ReceiptReply(request_id=request_id, receipt=None))

    async def bid_set(self, request_id: RequestId) -> tuple[bytes, ...] | None:
        await trio.lowlevel.checkpoint()
        if self.unreachable is not None:
            raise self.unreachable
        return self.leaves.get(request_id)

    def statistics(self) -> MarketStatistics:
        return MarketStatistics(
            coordinator_connected=self.unreachable is None,
            balance=NanoX(10**9),
            jobs_running=sum(not each.over.is_set() for each in self.bought),
            jobs_finished=sum(each.over.is_set() for each in self.bought),
            failovers=0,
            deliveries_waiting=0,
            last_auction_ms=12,
        )


def roster() -> tuple[ProviderView, ...]:
    return tuple(
        ProviderView(
            peer=signer.peer_id,
            addresses=(f"/ip4/127.0.0.1/tcp/{4000 + number}/p2p/{signer.peer_id}",),
            models=(offer(output=200_000_000 + 20_000_000 * number),),
            connected=number == 0,
        )
        for number, signer in enumerate(PROVIDERS)
    )


def offer(*, output: int, model: str = MODEL, window: int = 8192) -> ModelOffer:
    return ModelOffer(
        model=model,
        digest=DIGEST,
        context_window=window,
        capacity=8,
        prices=PriceList(
            input=NanoX(50_000_000), cached_input=NanoX(12_500_000), output=NanoX(output)
        ),
        kinds=(JobKind.CHAT, JobKind.COMPLETION),
        licence="apache-2.0",
        owner="huggingface",
    )
