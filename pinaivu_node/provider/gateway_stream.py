"""One gateway's inference stream: its dispatches in, tokens of all its jobs out.

Three kinds of task share the stream: one reads, one writes, and each job has its own.  None waits
for another but through `Outbound`: a job puts its tokens there and goes on, the writer takes all
that is there whenever its last frame has left.  When the stream is lost the jobs are cancelled
where they stand, and what they had sent is proven all the same.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

import trio

from pinaivu_node.engine.types import EngineBusy, EngineError, PromptRefused, TokenEvent
from pinaivu_node.mesh.mesh import FrameStream, MeshError, StreamLost
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import RequestId
from pinaivu_node.protocol.inference import (
    TO_PROVIDER,
    Accept,
    Cancel,
    Dispatch,
    Refuse,
    RefuseReason,
)
from pinaivu_node.protocol.market import Voucher
from pinaivu_node.protocol.signing import Envelope, open_untrusted
from pinaivu_node.protocol.wire import Message, decode_untrusted
from pinaivu_node.provider.dispatch import FORGED
from pinaivu_node.provider.jobs import (
    CANCELLED,
    Ending,
    Job,
    failed,
    over_limits,
    stalled,
)
from pinaivu_node.provider.outbound import Outbound
from pinaivu_node.provider.shop import Shop

logger = logging.getLogger(__name__)

_MAX_FORGERIES: Final = 32
"""Dispatches that no honest gateway sends, until the stream is cut."""
_MAX_WAITING_ANSWERS: Final = 256
"""Answers that wait to be read before we read on: a burst of dispatches, twenty kilobytes."""


@dataclass(eq=False, slots=True)
class _Work:
    """A job and the scope of its task."""

    job: Job
    ending: Ending = CANCELLED
    """How it ends if nothing else is said: it was cancelled from outside."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    is_accepted: bool = False


class GatewayStream:
    """Serves one stream; made when it is opened and thrown away when it ends."""

    def __init__(self, stream: FrameStream, shop: Shop) -> None:
        self._stream = stream
        self._shop = shop
        self._outbound = Outbound(shop.seal)
        self._something_waits = trio.Event()
        self._round_done = trio.Event()
        self._works: dict[RequestId, _Work] = {}
        self._forgeries = 0
        self._failure: MeshError | RemoteProtocolError | None = None
        self._scope = trio.CancelScope()

    @property
    def jobs(self) -> int:
        """How many of its jobs are not over."""
        return len(self._works)

    def close(self) -> None:
        """Make `serve` return: another stream takes this one's place."""
        self._stream.reset()
        self._scope.cancel()

    async def serve(self) -> None:
        """Serve until the stream ends, which raises what it ended with.

        Every job is over and its proof in the shop when this returns, also when cancelled.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    await self._read(nursery)
                    self._scope.cancel()
        finally:
            for job, ending in self._outbound.take_unfinished():
                self._shop.seal(job, ending)
        if self._failure is not None:
            raise self._failure

    # --- reading ----------------------------------------------------------------------------------

    async def _read(self, nursery: trio.Nursery) -> None:
        try:
            while True:
                frame = await self._stream.receive()
                self._take_untrusted(decode_untrusted(frame, *TO_PROVIDER), nursery)
                while self._outbound.waiting_answers > _MAX_WAITING_ANSWERS:
                    await self._round_done.wait()
        except (MeshError, RemoteProtocolError) as exc:
            self._failure = exc

    def _take_untrusted(self, message: Message, nursery: trio.Nursery) -> None:
        match message:
            case Dispatch():
                self._on_dispatch_untrusted(message, nursery)
            case Cancel(request_id=request_id):
                # One that is over already, or was never ours, is nobody's fault.
                if (work := self._works.get(request_id)) is not None:
                    work.scope.cancel()
            case Envelope():
                self._on_voucher_untrusted(message)
            case _:
                raise RemoteProtocolError(f"a provider takes no {message.kind}")

    def _on_dispatch_untrusted(self, dispatch: Dispatch, nursery: trio.Nursery) -> None:
        answer = self._shop.admit_untrusted(dispatch, sender=self._stream.peer, jobs=self.jobs)
        if isinstance(answer, Refuse):
            self._refuse(answer)
            self._forgeries += answer.reason in FORGED
            if self._forgeries > _MAX_FORGERIES:
                raise RemoteProtocolError(f"{self._forgeries} dispatches that it had no right to")
            return
        work = self._works[answer.request_id] = _Work(answer)
        self._shop.stopped_by(answer, work.scope.cancel)
        nursery.start_soon(self._run, work, dispatch)
        if self._shop.must_be_loaded(answer):
            nursery.start_soon(self._accept_meanwhile, work)

    def _on_voucher_untrusted(self, envelope: Envelope) -> None:
        voucher = open_untrusted(envelope, Voucher, signer=self._stream.peer)
        if voucher.provider != self._shop.me:
            raise RemoteProtocolError("a voucher for another provider")
        if (work := self._works.get(voucher.request_id)) is not None:
            work.job.vouched(envelope, voucher.output_tokens)

    # --- jobs -------------------------------------------------------------------------------------

    async def _run(self, work: _Work, dispatch: Dispatch) -> None:
        """One job from its dispatch to its last word, whatever happens to it."""
        job = work.job
        deadline = trio.current_time() + self._shop.time_left(job) / 1000
        work.scope.deadline = deadline
        refused: Refuse | None = None
        try:
            with work.scope:
                refused = await self._generate(work, dispatch)
            if work.scope.cancelled_caught and trio.current_time() >= deadline:
                work.ending = failed("the deadline passed")
        except Exception:
            logger.exception("job %s failed", job.request_id)
            work.ending = failed("internal error")
        finally:
            del self._works[job.request_id]
            self._shop.leave_engine(job)
            if refused is None:
                self._end(work)
        if refused is not None:
            self._refuse(refused)

    async def _generate(self, work: _Work, dispatch: Dispatch) -> Refuse | None:
        """Let the engine work; a Refuse if it would not begin, else `work.ending` says the end."""
        job = work.job
        engine = self._shop.served[job.token.model].engine
        try:
            async with engine.generate(self._shop.generation(job, dispatch)) as events:
                if not work.is_accepted:
                    self._accept(work)
                work.ending = await self._relay(job, events)
        except EngineError as exc:
            if not work.is_accepted:
                return self._shop.turned_away(job, _reason_of(exc), str(exc))
            work.ending = failed(str(exc))
        return None

    async def _accept_meanwhile(self, work: _Work) -> None:
        """Tell the gateway that its job is being worked on, if its model takes time to load.

        What is refused is mostly refused at once, for want of memory; a load that fails later, or a
        prompt that the loaded model will not have, ends the job as a failure.
        """
        await trio.sleep(self._shop.config.accept_within_ms / 1000)
        if self._works.get(work.job.request_id) is work and not work.is_accepted:
            self._accept(work)

    async def _relay(self, job: Job, events: AsyncIterator[TokenEvent]) -> Ending:
        limit = self._shop.config.max_unvouched_tokens
        async for event in events:
            self._shop.computed(job, event)
            if event.input_tokens > job.token.input_limit:
                return over_limits(
                    f"over_limits: {event.input_tokens} prompt tokens, "
                    f"{job.token.input_limit} were auctioned"
                )
            if (
                event.token_ids
                or event.text
                or event.tool_calls
                or _ends_one_of_several(job, event)
            ):
                self._send_tokens(job, event)
            ending = job.ending_after(event)
            if ending is not None:
                return ending
            if job.unvouched > limit:
                return stalled(f"the gateway has vouched for none of {job.unvouched} tokens")
        return failed("the engine stopped without saying why")

    # --- writing ----------------------------------------------------------------------------------

    def _accept(self, work: _Work) -> None:
        work.is_accepted = True
        self._shop.accepted()
        self._outbound.answer(Accept(request_id=work.job.request_id))
        self._something_waits.set()

    def _refuse(self, refuse: Refuse) -> None:
        self._outbound.answer(refuse)
        self._something_waits.set()

    def _send_tokens(self, job: Job, event: TokenEvent) -> None:
        self._outbound.add(job, event)
        self._something_waits.set()
        if self._outbound.waiting_bytes > self._shop.config.max_outbound_bytes:
            self._give_up()

    def _end(self, work: _Work) -> None:
        if not work.is_accepted:
            self._accept(work)  # cancelled on the engine's doorstep: Done follows an Accept only
        if work.ending is CANCELLED:
            self._outbound.drop_tokens(work.job)
        self._outbound.end(work.job, work.ending)
        self._something_waits.set()

    def _give_up(self) -> None:
        """The gateway reads more slowly than its jobs bring tokens: stop them all."""
        explanation = "the gateway reads too slowly"
        for work in self._works.values():
            work.ending = stalled(explanation)
        self._failure = self._failure or StreamLost(explanation)
        self.close()

    async def _write(self) -> None:
        try:
            while True:
                await self._something_waits.wait()
                self._something_waits = trio.Event()
                for frame in self._outbound.frames():
                    await self._stream.send(frame)
                self._round_done.set()
                self._round_done = trio.Event()
        except MeshError as exc:
            self._failure = self._failure or exc
            self._scope.cancel()


def _ends_one_of_several(job: Job, event: TokenEvent) -> bool:
    return job.answers > 1 and event.finish_reason is not None


def _reason_of(error: EngineError) -> RefuseReason:
    if isinstance(error, EngineBusy):
        return RefuseReason.FULL
    if isinstance(error, PromptRefused):
        return RefuseReason.PROMPT_REFUSED
    return RefuseReason.ENGINE_UNAVAILABLE
