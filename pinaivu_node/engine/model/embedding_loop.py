"""The step loop of an engine that makes vectors: inputs of all requests share its batches.

A vector does not depend on its batch mates (see `embedding.py`), so a request of one short text
rides along with another's thousand and is answered with the next step.  Requests are served in
turns: each step takes the longest inputs left of one request, fills up from the others, and the
next step begins with the next request.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.frames import (
    GAUGES_INTERVAL_S,
    Cancel,
    Embed,
    Frame,
    FrameError,
    Gauges,
    Generate,
    Ping,
    Pong,
    Ready,
    Refused,
    embedded,
)
from pinaivu_node.engine.model.embedding import NO_VECTOR, EncoderModel, Vector
from pinaivu_node.engine.model.pretrained import Progress
from pinaivu_node.engine.types import EmbeddingRequest, Embeddings, PromptRefused

_MAX_CANCELLED: Final = 4096
"""Requests cancelled before they were tokenised; more than the daemon ever has in preparation."""
_CAPACITY: Final = 64
"""Requests at once.  They share batches, so more of them cost no one anything but time."""
_WARM_UP_TOKENS: Final = 32
_MAX_FAILURES: Final = 3
"""Steps that fail in a row before the process gives itself up."""


@dataclass(slots=True)
class Tokenised:
    """A request that can be run, and what is still to be made of it."""

    request: EmbeddingRequest
    inputs: list[list[int]]
    asked: float
    """On the monotonic clock."""
    vectors: dict[int, Vector] = field(default_factory=dict)
    left: deque[int] = field(default_factory=deque)
    """Numbers of the inputs without a vector, the longest first."""

    @property
    def tokens(self) -> int:
        """Of all its inputs."""
        return sum(map(len, self.inputs))

    @property
    def deadline(self) -> float:
        """On the monotonic clock."""
        after = self.request.deadline_ms
        return float("inf") if after is None else self.asked + after / 1000


def tokenised(encoder: EncoderModel, request: EmbeddingRequest) -> Tokenised | Refused:
    """The request, ready to be run, or why it cannot be.  Slow for a long one: not for the loop."""
    asked = time.monotonic()
    try:
        inputs = encoder.tokenised(request)
    except PromptRefused as exc:
        return Refused(request.id, str(exc))
    except Exception as exc:  # noqa: BLE001 - the engine's per-request edge
        traceback.print_exc()
        return Refused(request.id, f"It cannot be tokenised: {type(exc).__name__}.")
    order = sorted(range(len(inputs)), key=lambda number: -len(inputs[number]))
    return Tokenised(request, inputs, asked, left=deque(order))


def serve(
    config: EngineConfig,
    progress: Progress,
    *,
    inbox: queue.SimpleQueue[Any],
    work: queue.SimpleQueue[Generate | Embed],
    say: Callable[[Frame], None],
) -> NoReturn:
    """Load an encoder and serve it; LoadError if it cannot be loaded.

    Requests come from `work` and are tokenised on a thread of their own; the rest of what the
    daemon says comes from `inbox`.
    """
    encoder = EncoderModel.load(config, progress)
    loop = EmbeddingLoop(encoder, batch_tokens=config.prefill_chunk, inbox=inbox, say=say)
    progress(0.95, "warming up")
    seconds = _warmed(encoder)
    say(
        Ready(
            device=str(encoder.device),
            dtype=str(encoder.dtype).removeprefix("torch."),
            capacity=_CAPACITY,
            context_window=encoder.context_window,
            tokens_per_second=_WARM_UP_TOKENS / seconds,
            ttft_ms=round(1000 * seconds),
        )
    )
    threading.Thread(target=_prepare, args=(encoder, work, inbox), daemon=True).start()
    loop.run()


def _warmed(encoder: EncoderModel) -> float:
    """Seconds that a short input takes, not counting what only the first one pays for."""
    began = 0.0
    for _ in range(2):
        began = time.monotonic()
        encoder.vectors([[0] * min(_WARM_UP_TOKENS, encoder.context_window)])
    return max(time.monotonic() - began, 1e-6)


def _prepare(
    encoder: EncoderModel, work: queue.SimpleQueue[Generate | Embed], inbox: queue.SimpleQueue[Any]
) -> None:
    while True:
        match work.get():
            case Embed(request=request):
                inbox.put(tokenised(encoder, request))
            case Generate(request=generation):
                reason = "This model makes embeddings; it generates no text."
                inbox.put(Refused(generation.id, reason))


class EmbeddingLoop:
    """One encoder and the requests it works on; for the main thread of the engine's process."""

    def __init__(
        self,
        encoder: EncoderModel,
        *,
        batch_tokens: int,
        inbox: queue.SimpleQueue[Any],
        say: Callable[[Frame], None],
    ) -> None:
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._inbox = inbox
        self._say = say
        self._jobs: dict[str, Tokenised] = {}
        self._cancelled: dict[str, None] = {}
        self._failures = 0
        self._input_tokens = 0
        self._speed = 0.0
        self._said_at = 0.0

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self._jobs)

    def run(self) -> NoReturn:
        """Serve until the process ends."""
        while True:
            self.hear()
            self.step()

    def hear(self) -> None:
        """Take in what was said; wait for something if there is nothing else to do."""
        while not self._jobs or not self._inbox.empty():
            match self._inbox.get():
                case Tokenised() as job:
                    self._accept(job)
                case Refused() as refused:
                    self._cancelled.pop(refused.request_id, None)
                    self._say(refused)
                case Cancel(request_id=request_id):
                    self._cancel(request_id)
                case Ping(number=number):
                    self._say(Pong(number))
                case frame:
                    raise FrameError(f"the daemon said {type(frame).__name__}")

    def step(self) -> None:
        """One batch, if there is anything to compute."""
        began = time.monotonic()
        for job in [job for job in self._jobs.values() if began > job.deadline]:
            self._refuse(job, "The deadline passed.")
        batch = self._batch()
        if batch:
            self._compute(batch)
            tokens = sum(len(job.inputs[number]) for job, number in batch)
            self._speed = tokens / max(time.monotonic() - began, 1e-6)
        self._say_gauges()

    # --- requests ---------------------------------------------------------------------------------

    def _accept(self, job: Tokenised) -> None:
        self._input_tokens += job.tokens
        self._jobs[job.request.id] = job
        if job.request.id in self._cancelled:
            del self._cancelled[job.request.id]
            self._refuse(job, "It was cancelled.")

    def _cancel(self, request_id: str) -> None:
        job = self._jobs.get(request_id)
        if job is not None:
            self._refuse(job, "It was cancelled.")
            return
        # It is being tokenised, or ended while the cancel was on its way.
        self._cancelled[request_id] = None
        if len(self._cancelled) > _MAX_CANCELLED:
            del self._cancelled[next(iter(self._cancelled))]

    def _refuse(self, job: Tokenised, reason: str) -> None:
        del self._jobs[job.request.id]
        self._say(Refused(job.request.id, reason))

    # --- a step -----------------------------------------------------------------------------------

    def _batch(self) -> list[tuple[Tokenised, int]]:
        """The inputs of the next step; the request that led it goes to the end of the line."""
        batch: list[tuple[Tokenised, int]] = []
        room = self._batch_tokens
        for job in self._jobs.values():
            while job.left and (not batch or len(job.inputs[job.left[0]]) <= room):
                number = job.left.popleft()
                room -= len(job.inputs[number])
                batch.append((job, number))
            # The longest left does not fit; the shortest may.
            while job.left and len(job.inputs[job.left[-1]]) <= room:
                number = job.left.pop()
                room -= len(job.inputs[number])
                batch.append((job, number))
        if batch:
            leader = batch[0][0]
            self._jobs[leader.request.id] = self._jobs.pop(leader.request.id)
        return batch

    def _compute(self, batch: list[tuple[Tokenised, int]]) -> None:
        try:
            vectors = self._encoder.vectors([job.inputs[number] for job, number in batch])
        except Exception as exc:
            traceback.print_exc()
            self._failures += 1
            if self._failures >= _MAX_FAILURES or self._encoder.device.type != "cpu":
                raise
            self._fail((job for job, _ in batch), f"{type(exc).__name__} in a step")
            return
        self._failures = 0
        pairs = list(zip(batch, vectors, strict=True))
        for (job, number), vector in pairs:
            if vector is not None:
                job.vectors[number] = vector
        self._fail((job for (job, _), vector in pairs if vector is None), NO_VECTOR)
        for job in [job for job in self._jobs.values() if len(job.vectors) == len(job.inputs)]:
            del self._jobs[job.request.id]
            whole = tuple(job.vectors[number] for number in range(len(job.inputs)))
            for frame in embedded(job.request.id, Embeddings(whole, job.tokens)):
                self._say(frame)

    def _fail(self, jobs: Iterable[Tokenised], reason: str) -> None:
        for request_id in dict.fromkeys(job.request.id for job in jobs):
            self._refuse(self._jobs[request_id], reason)

    # --- what the daemon should know --------------------------------------------------------------

    def _say_gauges(self) -> None:
        now = time.monotonic()
        if now - self._said_at < GAUGES_INTERVAL_S and self._jobs:
            return
        self._said_at = now
        self._say(
            Gauges(
                running=len(self._jobs),
                queued=0,
                kv_blocks_free=0,
                input_tokens=self._input_tokens,
                cached_tokens=0,
                preemptions=0,
                prefix_horizon_s=0.0,
                prefill_tokens_per_second=self._speed,
                decode_tokens_per_second=0.0,
                queued_prefill_tokens=sum(
                    len(job.inputs[number]) for job in self._jobs.values() for number in job.left
                ),
            )
        )
