"""The engine's own process: `python -m pinaivu_node.engine.child`, started by `client.py`.

Two threads.  The reader takes frames from stdin and hands them over; the main thread runs the step
loop and is the only one to write to stdout.  Pings are answered by the step loop and not by the
reader: an answer proves that steps are made, not merely that a process exists.

The process ends when the daemon does: stdin then ends, and the reader exits on the spot.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.frames import (
    Accepted,
    Cancel,
    Embed,
    Frame,
    FrameDecoder,
    FrameError,
    Generate,
    Load,
    LoadFailed,
    Ping,
    Pong,
    Ready,
    Refused,
    encode,
)
from pinaivu_node.engine.types import (
    FinishReason,
    GenerationRequest,
    PromptRefused,
    StepFrame,
    TokenEvent,
)

if TYPE_CHECKING:
    from pinaivu_node.engine.torch_model import Generation, TorchModel

_MAX_FAILURES: Final = 3
"""Generations that fail in a row before the process gives itself up: one is the request's fault,
three are a device in a bad state, which only a new process cures."""


@dataclass(frozen=True, slots=True)
class _Job:
    generation: Generation
    deadline: float | None
    """On the monotonic clock."""


class StepLoop:
    """Commands in, steps of the model, events out.

    One generation runs at a time, the others wait in order of arrival; the daemon bounds how many
    it sends.  Commands are heard between steps, so nothing here changes under a running step.
    """

    def __init__(
        self, model: TorchModel, *, inbox: queue.SimpleQueue[Frame], say: Callable[[Frame], None]
    ) -> None:
        self._model = model
        self._inbox = inbox
        self._say = say
        self._jobs: dict[str, _Job] = {}
        self._failures = 0

    def run(self) -> NoReturn:
        """Serve until the process ends."""
        while True:
            self._hear()
            request_id, job = next(iter(self._jobs.items()))
            event = self._step(job)
            if event is None:
                self._say(Pong(0))  # a chunk of a long prompt is done: the loop lives
                continue
            if event.finish_reason is not None:
                del self._jobs[request_id]
            self._say(StepFrame((event,)))

    def _hear(self) -> None:
        """Obey every command there is; wait for one if there is nothing else to do."""
        while not self._jobs or not self._inbox.empty():
            match self._inbox.get():
                case Generate(request=request):
                    self._accept(request)
                case Embed(request=embedding):
                    self._say(Refused(embedding.id, "This model makes no embeddings."))
                case Cancel(request_id=request_id):
                    self._cancel(request_id)
                case Ping(number=number):
                    self._say(Pong(number))
                case frame:
                    raise FrameError(f"the daemon said {type(frame).__name__}")

    def _accept(self, request: GenerationRequest) -> None:
        if request.sampling.n != 1 or request.constraint is not None or request.tools is not None:
            self._say(Refused(request.id, "This engine gives one answer, in free text."))
            return
        try:
            generation = self._model.start(request)
        except PromptRefused as exc:
            self._say(Refused(request.id, str(exc)))
            return
        except Exception as exc:  # noqa: BLE001 - the engine's per-request edge
            traceback.print_exc()
            self._say(Refused(request.id, f"The prompt cannot be prepared: {type(exc).__name__}."))
            return
        deadline = request.deadline_ms
        ends = None if deadline is None else time.monotonic() + deadline / 1000
        self._jobs[request.id] = _Job(generation, ends)
        self._say(Accepted(request.id, generation.prompt_tokens))

    def _cancel(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        if job is not None:  # else it ended while the cancel was on its way
            self._say(StepFrame((job.generation.ended(FinishReason.CANCELLED),)))

    def _step(self, job: _Job) -> TokenEvent | None:
        if job.deadline is not None and time.monotonic() > job.deadline:
            return job.generation.ended(FinishReason.ERROR, error="the deadline passed")
        try:
            event = job.generation.step()
        except Exception as exc:
            traceback.print_exc()
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                raise
            return job.generation.ended(FinishReason.ERROR, error=f"{type(exc).__name__} in a step")
        self._failures = 0
        return event


def _read(source: int, inbox: queue.SimpleQueue[Frame]) -> None:
    """Hand over frames until the daemon is gone, then end the process."""
    decoder = FrameDecoder()
    try:
        while data := os.read(source, 65536):
            for frame in decoder.feed(data):
                inbox.put(frame)
    except (OSError, FrameError):
        traceback.print_exc()
    # Not sys.exit: the main thread may be deep in a kernel, and nobody is left to hear it.
    os._exit(0)


def _write(target: int, frame: Frame) -> None:
    data = memoryview(encode(frame))
    try:
        while data:
            data = data[os.write(target, data) :]
    except BrokenPipeError:
        os._exit(0)  # the daemon is gone


def _loaded(config: EngineConfig, say: Callable[[Frame], None]) -> TorchModel | None:
    """The model, warm; None after the reason was said."""
    if not (config.model / "config.json").is_file():
        say(LoadFailed(f"{config.model} holds no model (no config.json): pull it again"))
        return None
    from pinaivu_node.engine.torch_model import LoadError, TorchModel

    try:
        model = TorchModel.load(config)
        speed = model.warm_up()
    except LoadError as exc:
        say(LoadFailed(str(exc)))
        return None
    say(
        Ready(
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            capacity=1,
            context_window=model.context_window,
            tokens_per_second=speed.tokens_per_second,
            ttft_ms=speed.ttft_ms,
        )
    )
    return model


def main() -> int:
    """Serve one model over stdin and stdout until the daemon closes them."""
    # Ctrl-C in a terminal reaches the whole foreground group; the daemon decides what ends when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, target = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # whatever a library prints goes to the log, not among the frames
    # The model is on disk: nothing here may reach out, or draw progress bars into the log.
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    os.environ.update(TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")

    inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(source, inbox), daemon=True).start()
    say = partial(_write, target)
    first = inbox.get()
    if not isinstance(first, Load):
        raise FrameError(f"the daemon began with {type(first).__name__}")
    model = _loaded(EngineConfig.model_validate_json(first.config), say)
    if model is not None:
        StepLoop(model, inbox=inbox, say=say).run()
    return 1


if __name__ == "__main__":
    sys.exit(main())
