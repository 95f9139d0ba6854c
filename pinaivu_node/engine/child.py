"""The engine's own process: `python -m pinaivu_node.engine.child`, started by `client.py`.

Three threads.  The reader takes frames from stdin; requests go to the preparer, which tokenises
them and compiles their grammars; whatever is left goes to the main thread, which runs the step loop
and is the only one to write to stdout.  Pings are answered by the step loop and not by the reader:
an answer proves that steps are made, not merely that a process exists.

The process ends when the daemon does: stdin then ends, and the reader exits on the spot.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.frames import (
    Embed,
    Frame,
    FrameDecoder,
    FrameError,
    Generate,
    Load,
    LoadFailed,
    Loading,
    Ping,
    Pong,
    Ready,
    Refused,
    encode,
)

if TYPE_CHECKING:
    from pinaivu_node.engine.batching.preparation import Preparation, Prepared
    from pinaivu_node.engine.batching.step_loop import StepLoop

    Said = Frame | Prepared

_READ_BYTES: Final = 65536


@dataclass(frozen=True)
class _Queues:
    """What the threads hand to each other; the daemon bounds how much there can be."""

    inbox: queue.SimpleQueue[Said] = field(default_factory=queue.SimpleQueue)
    """For the step loop."""
    work: queue.SimpleQueue[Generate | Embed] = field(default_factory=queue.SimpleQueue)
    """For the preparer."""
    preparing: set[str] = field(default_factory=set)
    """Requests on their way through `work`, until the step loop has them."""


def _read(source: int, queues: _Queues) -> None:
    """Hand over frames until the daemon is gone, then end the process."""
    decoder = FrameDecoder()
    try:
        while data := os.read(source, _READ_BYTES):
            for frame in decoder.feed(data):
                if isinstance(frame, Generate | Embed):
                    queues.preparing.add(frame.request.id)
                    queues.work.put(frame)
                else:
                    queues.inbox.put(frame)
    except BaseException:  # noqa: BLE001 - without this thread the process would be deaf
        traceback.print_exc()
    # Not sys.exit: the main thread may be deep in a kernel, and nobody is left to hear it.
    os._exit(0)


def _prepare(preparation: Preparation, queues: _Queues) -> None:
    """Turn requests into answers, in the order in which they came."""
    while True:
        match queues.work.get():
            case Generate(request=request):
                queues.inbox.put(preparation.prepare(request))
            case Embed(request=embedding):
                reason = "This model generates text; it makes no embeddings."
                queues.inbox.put(Refused(embedding.id, reason))


def _write(target: int, frame: Frame) -> None:
    data = memoryview(encode(frame))
    try:
        while data:
            data = data[os.write(target, data) :]
    except BrokenPipeError:
        os._exit(0)  # the daemon is gone


class _Heartbeat:
    """Says how far loading is, and answers pings meanwhile."""

    def __init__(self, say: Callable[[Frame], None], inbox: queue.SimpleQueue[Said]) -> None:
        self._say = say
        self._inbox = inbox
        self._progress = 0.0

    def compiling(self) -> None:
        """Kernels are compiled for whatever is being done."""
        self(self._progress, "compiling kernels, once on this machine")

    def __call__(self, progress: float, what: str) -> None:
        self._progress = progress
        self._say(Loading(progress, what))
        while not self._inbox.empty():
            match self._inbox.get():
                case Ping(number=number):
                    self._say(Pong(number))
                case _:
                    pass  # a cancel: nothing runs yet


def _serve(config: EngineConfig, queues: _Queues, say: Callable[[Frame], None]) -> None:
    """Load the model and serve it; returns only if it cannot be loaded."""
    gc.disable()  # what is made from here to readiness stays, and is walked ten times in vain

    def say_or_be_ready(frame: Frame) -> None:
        say(frame)
        if isinstance(frame, Ready):
            gc.freeze()
            gc.enable()

    progress = _Heartbeat(say, queues.inbox)
    progress(0.0, "starting")
    from pinaivu_node.engine.model.weights import LoadError, check_files, is_encoder

    try:
        check_files(config.model)  # before torch is imported, which takes seconds
        if is_encoder(config.model):
            from pinaivu_node.engine.model import embedding_loop

            embedding_loop.serve(
                config, progress, inbox=queues.inbox, work=queues.work, say=say_or_be_ready
            )
        else:
            _serve_text(config, queues, say_or_be_ready, progress=progress)
    except LoadError as exc:
        say(LoadFailed(str(exc)))


def _serve_text(
    config: EngineConfig,
    queues: _Queues,
    say: Callable[[Frame], None],
    *,
    progress: _Heartbeat,
) -> None:
    """Load a model that makes text and serve it; LoadError if it cannot be loaded."""
    from pinaivu_node.engine.batching.preparation import Preparation
    from pinaivu_node.engine.batching.step_loop import StepLoop
    from pinaivu_node.engine.model.compiling import telling_of_compiling
    from pinaivu_node.engine.model.loading import load

    with telling_of_compiling(progress.compiling):
        model = load(config, progress)
        progress(0.92, "reading the vocabulary")
        preparation = Preparation(model, speculates=config.speculate != 0)
        preparation.warm_up()
        max_running = config.most_running(on_cpu=model.device.type == "cpu")
        loop = StepLoop(
            model,
            config,
            max_running=max_running,
            inbox=queues.inbox,
            preparing=queues.preparing,
            say=say,
        )
        progress(0.95, "warming up")
        tokens_per_second, ttft_ms = _warmed(loop, preparation)
    say(
        Ready(
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            capacity=max_running,
            context_window=model.context_window,
            tokens_per_second=tokens_per_second,
            ttft_ms=ttft_ms,
            kv_blocks=model.pool.count,
        )
    )
    threading.Thread(target=_prepare, args=(preparation, queues), daemon=True).start()
    loop.run()


def _warmed(loop: StepLoop, preparation: Preparation) -> tuple[float, int]:
    """Answer a short request, so that no client pays for the first use of every kernel; another
    one says how many tokens a second there are, and how many milliseconds to the first.
    """
    for _ in loop.answer(preparation.warm_up_answer(tokens=2)):
        pass
    began = time.monotonic()
    times = [time.monotonic() for _ in loop.answer(preparation.warm_up_answer())]
    speed = (len(times) - 1) / max(times[-1] - times[0], 1e-6)
    return speed, round(1000 * (times[0] - began))


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

    queues = _Queues()
    threading.Thread(target=_read, args=(source, queues), daemon=True).start()
    say = partial(_write, target)
    first = queues.inbox.get()
    if not isinstance(first, Load):
        raise FrameError(f"the daemon began with {type(first).__name__}")
    _serve(EngineConfig.model_validate_json(first.config), queues, say)
    return 1


if __name__ == "__main__":
    try:
        status = main()
    except Exception:  # noqa: BLE001 - the edge of the process
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    # Not sys.exit: with a GPU that is lost, or with other processes in the midst of a sum with this
    # one, the interpreter's own end can take for ever.
    os._exit(status)
