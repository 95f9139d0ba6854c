"""One engine child: the process, the frames to and from it, the requests that run in it.

`Child.serve` owns the process from start to end.  It returns when the child is over, for whatever
reason, with that reason in words, and leaves no process behind, also when it is cancelled.
"""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Final

import trio

from pinaivu_node.engine.calls import Call, EmbeddingCall
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.frames import (
    Accepted,
    Cancel,
    Embed,
    Embedded,
    Frame,
    FrameDecoder,
    FrameError,
    Gauges,
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
from pinaivu_node.engine.gauge import SpeedGauge, Timing
from pinaivu_node.engine.obituary import LastWords, MemoryWatch, obituary, oom_kills
from pinaivu_node.engine.types import (
    EmbeddingRequest,
    EngineBusy,
    GenerationRequest,
    PromptRefused,
    StepFrame,
    TokenEvent,
)

logger = logging.getLogger(__name__)

_COMMAND: Final = (sys.executable, "-P", "-m", "pinaivu_node.engine.child")
_LOG_LINE_BYTES: Final = 2000
_MAX_UNSENT_BYTES: Final = 64 * 2**20
"""What may wait for a child that reads nothing: four requests of the largest size there is."""
_LAST_WORDS_S: Final = 1.0
"""How long a dying child may take to end its log; it has closed its frames already."""


class Child:
    """One life of the engine process."""

    def __init__(
        self, config: EngineConfig, *, gauge: SpeedGauge, on_ready: Callable[[Ready], None]
    ) -> None:
        self.ready: Ready | None = None
        self.loading = Loading(0.0, "starting")
        self.gauges: Gauges | None = None
        self.calls: dict[str, Call | EmbeddingCall] = {}
        self.pid: int | None = None
        self._config = config
        self._gauge = gauge
        self._on_ready = on_ready
        self._loaded = trio.Event()
        self._log_ended = trio.Event()
        self._cause: str | None = None
        self._heard = False
        self._answered = False
        self._ping_open = False
        self._gauged_at = 0.0
        self._steps = 0
        self._rows = 0
        """Sequences that got tokens in those steps, since the last Gauges."""
        self._last_words = LastWords()
        self._memory = MemoryWatch(oom_kills)
        # Bounded by `_MAX_UNSENT_BYTES`; a Cancel per call and an open Ping come on top.
        self._outbox, self._to_write = trio.open_memory_channel[bytes](math.inf)
        self._unsent_bytes = 0

    # -- what the engine does with it -------------------------------------------------------------

    @property
    def places(self) -> int:
        """Sequences that run or wait in the child."""
        return sum(call.places for call in self.calls.values())

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens still to be computed: what the child said, and what came since then."""
        told = 0 if self.gauges is None else self.gauges.queued_prefill_tokens
        calls = self.calls.values()
        return told + sum(call.ungauged_tokens for call in calls if isinstance(call, Call))

    def submit(self, request: GenerationRequest, *, timing: Timing) -> Call:
        """Send a request in.

        Raises PromptRefused if it is too large to be sent at all, EngineBusy if the child takes in
        nothing at the moment.
        """
        frame = _encoded(Generate(request))
        call = Call(request, timing=timing)
        self._submit(call, frame)
        return call

    def submit_embedding(self, request: EmbeddingRequest) -> EmbeddingCall:
        """Send a request in; raises as `submit`."""
        frame = _encoded(Embed(request))
        call = EmbeddingCall(request)
        self._submit(call, frame)
        return call

    def abandon(self, call: Call | EmbeddingCall) -> None:
        """Cancel a call that nobody listens to any more; harmless if it is over."""
        call.abandon()
        self._cancel(call)

    def _submit(self, call: Call | EmbeddingCall, frame: bytes) -> None:
        if self._unsent_bytes + len(frame) > _MAX_UNSENT_BYTES:
            megabytes = self._unsent_bytes // 2**20
            raise EngineBusy(f"the engine is not reading: {megabytes} MB of requests wait for it")
        self.calls[call.request_id] = call
        self._send(frame)

    def _cancel(self, call: Call | EmbeddingCall) -> None:
        if self.calls.get(call.request_id) is call:
            self._send(encode(Cancel(call.request_id)))

    def _send(self, frame: bytes) -> None:
        self._unsent_bytes += len(frame)
        self._outbox.send_nowait(frame)

    async def serve(self) -> str:
        """Run the process; the reason of its end.  Every call in it ends with EngineDead."""
        try:
            process = await trio.lowlevel.open_process(
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # the terminal's Ctrl-C is for the daemon alone
            )
        except OSError as exc:
            return f"the engine process cannot be started: {exc}"
        self.pid = process.pid
        try:
            await self._converse(process)
            if self._cause is None:  # it closed its frames by itself: let it end by itself
                with trio.move_on_after(_LAST_WORDS_S):
                    await process.wait()
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream is not None:
                        await trio.aclose_forcefully(stream)
            self._end_calls(process.returncode)
        return self._cause or ""

    # -- tasks ------------------------------------------------------------------------------------

    async def _converse(self, process: trio.Process) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise AssertionError("all three are pipes")
        self._send(encode(Load(self._config.model_dump_json())))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, process.stdin)
            nursery.start_soon(self._log, process.stderr)
            nursery.start_soon(self._watch, nursery.cancel_scope)
            if await self._read(process.stdout):
                with trio.move_on_after(_LAST_WORDS_S):
                    await self._log_ended.wait()
            nursery.cancel_scope.cancel()

    async def _write(self, stdin: trio.abc.SendStream) -> None:
        try:
            async for frame in self._to_write:
                await stdin.send_all(frame)
                self._unsent_bytes -= len(frame)
        except trio.BrokenResourceError:
            pass  # the reader notices the same end, and knows more

    async def _read(self, stdout: trio.abc.ReceiveStream) -> bool:
        """Hear the child until it closes its frames; False if it spoke nonsense."""
        decoder = FrameDecoder()
        try:
            async for data in stdout:
                self._heard = True
                for frame in decoder.feed(data):
                    self._hear(frame)
        except FrameError as exc:
            self._cause = f"the engine process is broken: {exc}"
            return False
        return True

    async def _log(self, stderr: trio.abc.ReceiveStream) -> None:
        rest = b""
        async for data in stderr:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._log_line(line)
            rest = rest[-_LOG_LINE_BYTES:]
        self._log_line(rest)
        self._log_ended.set()

    def _log_line(self, line: bytes) -> None:
        text = line[:_LOG_LINE_BYTES].decode(errors="replace").rstrip()
        self._last_words.heard(text)
        if text:
            logger.info("engine process %s: %s", self.pid, text)

    async def _watch(self, everything: trio.CancelScope) -> None:
        """End the conversation with a child that does not load in time, falls silent, or goes on
        stepping while the thread that takes in requests hangs.
        """
        with trio.move_on_after(self._config.load_timeout_s):
            await self._loaded.wait()
        if self.ready is None:
            self._cause = f"the model did not load within {self._config.load_timeout_s:g} s"
            everything.cancel()
            return
        interval = min(self._config.ping_interval_s, self._config.hang_timeout_s / 2)
        silent = deaf = 0.0
        # Silence is counted in intervals in which nothing was heard, not by the clock: when it is
        # our own loop that was held up, the child is not to blame.
        while max(silent, deaf) < self._config.hang_timeout_s:
            self._heard = self._answered = False
            has_asked = self._has_asked
            if not self._ping_open:
                self._ping_open = True
                self._send(encode(Ping(1)))
            await trio.sleep(interval)
            silent = 0.0 if self._heard else silent + interval
            deaf = deaf + interval if has_asked and not self._answered else 0.0
        what = "the step loop was silent" if silent >= deaf else "it took in no request"
        self._cause = f"{what} for {self._config.hang_timeout_s:g} s: hung"
        everything.cancel()

    # -- what the child says ----------------------------------------------------------------------

    def _hear(self, frame: Frame) -> None:
        match frame:
            case StepFrame(events=events):
                self._steps += 1
                for event in events:
                    self._rows += bool(event.token_ids)
                    self._hear_event(event)
            case Accepted() | Refused() | Embedded():
                self._hear_answer(frame)
            case Gauges():
                self._hear_gauges(frame)
            case Pong(number=number):
                self._ping_open = self._ping_open and number == 0
            case Loading(progress=progress, what=what):
                if what != self.loading.what:
                    logger.info("engine %s: %.0f %%, %s", self._name, 100 * progress, what)
                self.loading = frame
            case Ready():
                self.ready = frame
                self._loaded.set()
                self._on_ready(frame)
            case LoadFailed(reason=reason):
                self._cause = reason
            case _:
                raise FrameError(f"{type(frame).__name__} is not the child's to say")

    def _hear_event(self, event: TokenEvent) -> None:
        call = self._call(event.request_id)
        if call is None:
            return
        if not isinstance(call, Call):
            raise FrameError(f"{event.request_id} is no generation")
        was_first = call.timing.first is None
        self._gauge.tokens(call.timing, len(event.token_ids), now=trio.current_time())
        if was_first and call.timing.first is not None:
            self._gauge.prompt(event.input_tokens - event.cached_tokens)
        listened = not call.abandoned
        call.deliver(event)
        if call.is_over:
            del self.calls[event.request_id]
            # A child that says its gauges has told the speed of every batch already.
            self._gauge.finished(call.timing, running=None if self.gauges else call.places)
        elif listened and call.abandoned:
            logger.warning("request %s is ended: its reader is too slow", event.request_id)
            self._cancel(call)

    def prefix_horizon_s(self) -> float:
        """Blocks used within so many seconds are still in the prefix cache."""
        if self.gauges is None:
            return 0.0
        # An idle engine says nothing, and gives nothing up.
        idle = not (self.gauges.running or self.gauges.queued)
        silence = trio.current_time() - self._gauged_at if idle else 0.0
        return self.gauges.prefix_horizon_s + silence

    def _hear_gauges(self, gauges: Gauges) -> None:
        now = trio.current_time()
        if (before := self.gauges) is not None:
            self._measure_prompts(before, gauges, seconds=now - self._gauged_at)
        self.gauges, self._gauged_at = gauges, now
        for call in self.calls.values():
            if isinstance(call, Call):
                call.is_gauged = call.accepted
        if self._rows:
            # Not `running`: some of those may still be at their prompts.
            size = round(self._rows / self._steps)
            self._gauge.batch(size, gauges.decode_tokens_per_second)
        self._steps = self._rows = 0

    def _measure_prompts(self, before: Gauges, now: Gauges, *, seconds: float) -> None:
        """The speed of prompts beside streams, from a time in which there were always both."""
        if self._rows == 0 or before.queued_prefill_tokens == 0 or now.queued_prefill_tokens == 0:
            return
        came = now.input_tokens - before.input_tokens
        done = before.queued_prefill_tokens + came - now.queued_prefill_tokens
        self._gauge.prompts_beside(done, seconds)

    @property
    def _has_asked(self) -> bool:
        """Whether a generation waits for a word on it."""
        return any(isinstance(call, Call) and not call.accepted for call in self.calls.values())

    def _hear_answer(self, said: Accepted | Refused | Embedded) -> None:
        self._answered = True
        call = self._call(said.request_id)
        if call is None:
            return
        match call, said:
            case (Call(), Accepted() | Refused()):
                call.answer(said)
            case (EmbeddingCall(), Refused()):
                call.answer(said)
            case (EmbeddingCall(), Embedded()):
                call.deliver(said)
            case _:
                raise FrameError(f"{type(said).__name__} is no answer to {said.request_id}")
        if call.is_over:
            del self.calls[said.request_id]

    def _call(self, request_id: str) -> Call | EmbeddingCall | None:
        call = self.calls.get(request_id)
        if call is None:
            logger.warning("the engine speaks of a request that it does not have: %s", request_id)
        return call

    @property
    def _name(self) -> str:
        return self._config.model.name

    def _end_calls(self, returncode: int | None) -> None:
        if self._cause is None:
            self._cause = obituary(
                returncode, str(self._last_words), memory_ran_out=self._memory.ran_out()
            )
        calls, self.calls = self.calls, {}
        self.ready = None
        for call in calls.values():
            call.die(self._cause)


def _encoded(frame: Generate | Embed) -> bytes:
    try:
        return encode(frame)
    except FrameError as exc:
        raise PromptRefused(f"The prompt cannot be taken: {exc}.") from exc
