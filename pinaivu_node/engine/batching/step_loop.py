"""The engine's heart: commands in, steps of the model, one frame of events out per step.

Runs on the main thread of the engine's process.  Commands are heard between steps, so nothing here
changes under a running step, and a cancel takes effect with the next one.
"""

from __future__ import annotations

import queue
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

import torch

from pinaivu_node.engine.batching.answer import Answer
from pinaivu_node.engine.batching.pace import Pace
from pinaivu_node.engine.batching.preparation import Prepared
from pinaivu_node.engine.batching.scheduler import Fit, Plan, Scheduler
from pinaivu_node.engine.batching.sequence import Sequence as Tokens
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.frames import (
    GAUGES_INTERVAL_S,
    Accepted,
    Cancel,
    Frame,
    FrameError,
    Gauges,
    Ping,
    Pong,
    Refused,
)
from pinaivu_node.engine.model.loading import LoadedModel
from pinaivu_node.engine.sampling.sampler import Broken, Chosen, choose
from pinaivu_node.engine.types import FinishReason, StepFrame, TokenEvent

_MAX_FAILURES: Final = 3
"""Steps that fail in a row before the process gives itself up: one is a request's fault, three are
a device in a bad state, which only a new process cures."""


_GUESS: Final = 8
"""Tokens, unless the configuration says otherwise."""
_GUESS_ROWS: Final = 16
"""Tokens of a decode step, guesses included: up to so many, reading the weights is what takes time
on a CPU as on a GPU, and a guess costs little."""


@dataclass(slots=True)
class _Job:
    """A request with answers to come."""

    answers: list[Answer]
    deadline: float
    """On the monotonic clock."""


@dataclass(slots=True)
class _Drawing:
    """An answer whose next tokens are being drawn, from these logits on."""

    answer: Answer
    row: int
    guess: tuple[int, ...]
    right: int = 0
    """How many of the guess were drawn."""


class StepLoop:
    """Scheduler, runner and sampler, and the requests they work on."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        *,
        max_running: int,
        inbox: queue.SimpleQueue[Frame | Prepared],
        preparing: set[str],
        say: Callable[[Frame], None],
    ) -> None:
        """`preparing` are the requests that will come as `Prepared` or `Refused`; whoever puts one
        before the preparer adds it, and it is taken out here.
        """
        self._model = model
        self._inbox = inbox
        self._preparing = preparing
        self._say = say
        self._scheduler = Scheduler(model.pool, max_running=max_running)
        on_cpu = model.device.type == "cpu"
        self._speculate = _GUESS if config.speculate is None and on_cpu else config.speculate or 0
        self._pace = Pace(longest_chunk=config.prefill_chunk, stretch=config.stretch)
        self._jobs: dict[str, _Job] = {}
        self._answers: dict[Tokens, tuple[str, Answer]] = {}
        self._cancelled: set[str] = set()
        """Cancelled while they were being prepared."""
        self._failures = 0
        self._mask = torch.zeros(max_running, -(-model.vocabulary // 32), dtype=torch.int32)
        self._meter = _Meter()

    def run(self) -> NoReturn:
        """Serve until the process ends."""
        while True:
            self._hear()
            self.step()

    def answer(self, prepared: Prepared) -> Iterator[TokenEvent]:
        """Run one request by itself, before any other; its events as they come."""
        events: list[Frame] = []
        said, self._say = self._say, events.append
        self._accept(prepared)
        while self._jobs:
            events.clear()
            self.step()
            for frame in events:
                if isinstance(frame, StepFrame):
                    yield from frame.events
        self._say = said

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self._jobs)

    def step(self) -> None:
        """One step, if there is anything to compute."""
        now = time.monotonic()
        events = self._expired(now)
        streaming = self._streaming()
        most = min(self._speculate, _GUESS_ROWS // streaming - 1) if streaming else 0
        plan = self._scheduler.plan(
            prefill_tokens=self._pace.chunk(decoding=streaming),
            now=now,
            guess=lambda sequence: self._answers[sequence][1].guess(most) if most > 0 else [],
        )
        if plan.chunks:
            events += self._made(plan)
            seconds = time.monotonic() - now
            self._pace.measured(seconds, decoding=plan.decoding, prefill_tokens=plan.prefill_tokens)
            self._meter.stepped(seconds, tokens=len(events))
        if events:
            self._say(StepFrame(tuple(events)))
        self._say_gauges()

    # --- commands ---------------------------------------------------------------------------------

    def _hear(self) -> None:
        """Obey every command there is; wait for one if there is nothing else to do."""
        while not self._jobs or not self._inbox.empty():
            self.obey(self._inbox.get())

    def obey(self, command: Frame | Prepared) -> None:
        """Do what one command says."""
        match command:
            case Prepared():
                self._accept(command)
            case Refused():
                self._refuse(command)
            case Cancel(request_id=request_id):
                self._cancel(request_id)
            case Ping(number=number):
                self._say(Pong(number))
            case _:
                raise FrameError(f"the daemon said {type(command).__name__}")

    def _accept(self, prepared: Prepared) -> None:
        request = prepared.request
        tokens = prepared.input_tokens + len(request.resume_token_ids)
        if self._scheduler.fits(tokens) is Fit.NEVER:
            self._refuse(Refused(request.id, "The prompt does not fit the engine's memory."))
            return
        self._preparing.discard(request.id)
        self._say(Accepted(request.id, prepared.input_tokens))
        self._meter.input_tokens += prepared.input_tokens
        deadline_ms = request.deadline_ms
        deadline = float("inf") if deadline_ms is None else time.monotonic() + deadline_ms / 1000
        job = _Job(list(prepared.answers), deadline)
        if request.id in self._cancelled:
            self._cancelled.remove(request.id)
            self._say(StepFrame(tuple(a.ended(FinishReason.CANCELLED) for a in job.answers)))
            return
        over = [answer for answer in job.answers if answer.finished is not None]
        if over:
            self._say(StepFrame(tuple(answer.over() for answer in over)))
        job.answers = [answer for answer in job.answers if answer.finished is None]
        if not job.answers:
            return
        self._jobs[request.id] = job
        for answer in job.answers:
            self._answers[answer.sequence] = (request.id, answer)
            self._scheduler.add(answer.sequence)

    def _refuse(self, refused: Refused) -> None:
        self._preparing.discard(refused.request_id)
        self._cancelled.discard(refused.request_id)
        self._say(refused)

    def _cancel(self, request_id: str) -> None:
        job = self._jobs.get(request_id)
        if job is None:
            # Otherwise it ended while the cancel was on its way.
            if request_id in self._preparing:
                self._cancelled.add(request_id)
            return
        self._say(StepFrame(tuple(self._end(job, FinishReason.CANCELLED))))

    # --- a step -----------------------------------------------------------------------------------

    def _streaming(self) -> int:
        return sum(each.is_decoding for each in self._scheduler.running)

    def _made(self, plan: Plan) -> list[TokenEvent]:
        """Compute a step; what it brought."""
        events: list[TokenEvent] = []
        try:
            logits = self._model.runner.compute(plan.chunks)
            self._scheduler.computed(plan)
            self._draw(logits, plan, events)
        except Exception as exc:
            traceback.print_exc()
            self._failures += 1
            if self._failures >= _MAX_FAILURES or not self._model.runner.survives(exc):
                raise
            self._model.pool.forget()
            planned = [chunk.sequence for chunk in plan.chunks]
            failed = [self._answers[each] for each in planned if each in self._answers]
            error = f"{type(exc).__name__} in a step"
            events += [self._close(*each, FinishReason.ERROR, error=error) for each in failed]
        else:
            self._failures = 0
        return events

    def _draw(self, logits: torch.Tensor, plan: Plan, events: list[TokenEvent]) -> None:
        """Draw a token for each answer, and more where it is the one that was guessed.

        The events of what was drawn before a failure are there.
        """
        drawing = []
        row = 0
        for chunk in plan.chunks:
            if chunk.rows:
                drawing.append(_Drawing(self._answers[chunk.sequence][1], row, chunk.guess))
                row += chunk.rows
        going_on = drawing
        while going_on:
            chosen = self._choose(logits, going_on)
            going_on = [
                each
                for each, token in zip(going_on, chosen, strict=True)
                if self._take(each, token, events)
            ]
        for each in drawing:
            if each.guess:
                each.answer.judge(guessed=len(each.guess), right=each.right)

    def _choose(
        self, logits: torch.Tensor, drawing: Sequence[_Drawing]
    ) -> Sequence[Chosen | Broken]:
        draws = []
        for number, each in enumerate(drawing):
            allowed = None
            if each.answer.matcher is not None:
                allowed = self._mask[number]
                each.answer.matcher.fill(allowed)
            draws.append(each.answer.draw(allowed))
        rows = [each.row for each in drawing]
        return choose(logits if len(rows) == len(logits) else logits[rows], draws)

    def _take(self, drawing: _Drawing, token: Chosen | Broken, events: list[TokenEvent]) -> bool:
        """Account for one token; whether the next one can be drawn as well."""
        answer = drawing.answer
        request_id, _ = self._answers[answer.sequence]
        if isinstance(token, Broken):
            # Whatever made these logits may lie in the cache.
            self._model.pool.unname(answer.sequence.blocks)
            events.append(self._close(request_id, answer, FinishReason.ERROR, error=token.reason))
            return False
        events.append(_taken(answer, token))
        if answer.finished is not None:
            self._forget(request_id, answer)
            return False
        if drawing.guess[drawing.right : drawing.right + 1] != (token.token_id,):
            return False
        self._scheduler.guessed_right(answer.sequence)
        drawing.right += 1
        drawing.row += 1
        return True

    def _expired(self, now: float) -> list[TokenEvent]:
        late = [job for job in self._jobs.values() if now > job.deadline]
        events = []
        for job in late:
            events += self._end(job, FinishReason.ERROR, error="the deadline passed")
        return events

    # --- endings ----------------------------------------------------------------------------------

    def _end(
        self, job: _Job, reason: FinishReason, *, error: str | None = None
    ) -> list[TokenEvent]:
        """Break off every answer of a job."""
        open_answers = [self._answers[answer.sequence] for answer in job.answers]
        return [self._close(*each, reason, error=error) for each in open_answers]

    def _close(
        self, request_id: str, answer: Answer, reason: FinishReason, *, error: str | None = None
    ) -> TokenEvent:
        event = answer.ended(reason, error=error)
        self._forget(request_id, answer)
        return event

    def _forget(self, request_id: str, answer: Answer) -> None:
        if answer.index == 0:
            self._meter.cached_tokens += answer.sequence.cached
        self._scheduler.remove(answer.sequence, now=time.monotonic())
        del self._answers[answer.sequence]
        job = self._jobs[request_id]
        job.answers.remove(answer)
        if not job.answers:
            del self._jobs[request_id]

    # --- what the daemon should know --------------------------------------------------------------

    def _say_gauges(self) -> None:
        now = time.monotonic()
        if now - self._meter.said_at < GAUGES_INTERVAL_S and self._jobs:
            return
        scheduler = self._scheduler
        kv = self._model.pool.statistics(now=now)
        queued = [*scheduler.running, *scheduler.waiting]
        self._say(
            Gauges(
                running=len(scheduler.running),
                queued=len(scheduler.waiting),
                kv_blocks_free=kv.blocks - kv.in_use - kv.kept,
                input_tokens=self._meter.input_tokens,
                cached_tokens=self._meter.cached_tokens,
                preemptions=scheduler.preemptions,
                prefix_horizon_s=kv.horizon_s,
                prefill_tokens_per_second=self._pace.prefill_tokens_per_second,
                decode_tokens_per_second=self._meter.tokens_per_second(),
                queued_prefill_tokens=sum(
                    each.to_compute for each in queued if not each.is_decoding
                ),
            )
        )
        self._meter.said(now)


def _taken(answer: Answer, token: Chosen) -> TokenEvent:
    """What a token brings its reader; whatever goes wrong in reading it is this answer's alone."""
    try:
        return answer.take(token)
    except Exception as exc:  # noqa: BLE001 - the per-request edge of a step
        traceback.print_exc()
        return answer.broken(f"{type(exc).__name__} in what was said")


class _Meter:
    """Counters between one frame of gauges and the next."""

    def __init__(self) -> None:
        self.input_tokens = 0
        self.cached_tokens = 0
        self.said_at = 0.0
        self._seconds = 0.0
        self._tokens = 0

    def stepped(self, seconds: float, *, tokens: int) -> None:
        """A step took so long and drew so many tokens."""
        self._seconds += seconds
        self._tokens += tokens

    def tokens_per_second(self) -> float:
        """Since the last frame."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def said(self, now: float) -> None:
        """A frame was sent."""
        self.said_at = now
        self._seconds, self._tokens = 0.0, 0
