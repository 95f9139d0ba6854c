"""One engine child: the process, the frames to and from it, the requests that run in it.

`Child.serve` owns the process from start to end.  It returns when the child is over, for whatever
reason, with that reason in words, and leaves no process behind, also when it is cancelled.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.frames import (
    Accepted,
    Cancel,
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
from pinaivu_node.engine.gauge import SpeedGauge, Timing
from pinaivu_node.engine.types import (
    EngineDead,
    GenerationRequest,
    PromptRefused,
    StepFrame,
    TokenEvent,
)

logger = logging.getLogger(__name__)

_COMMAND: Final = (sys.executable, "-P", "-m", "pinaivu_node.engine.child")
_LOG_LINE_BYTES: Final = 2000
_LAST_LINES: Final = 8
"""Enough of a traceback's end to say why a child died."""
_MAX_CALLS: Final = 2 * 4096
"""More requests than any engine runs and queues; `ProcessEngine` refuses long before."""
_LAST_WORDS_S: Final = 1.0
"""How long a dying child may take to end its log; it has closed its frames already."""


class Call:
    """One request in the child, from the caller's side: an async iterator of its events."""

    def __init__(self, request: GenerationRequest, *, window: int, timing: Timing) -> None:
        self.request_id = request.id
        self.timing = timing
        self.abandoned = False
        self._death: str | None = None
        self._over = False
        # One event per token at most, and one more for the end: the sender never has to wait.
        self._send, self._receive = trio.open_memory_channel[Accepted | Refused | TokenEvent](
            window + 2
        )

    def deliver(self, said: Accepted | Refused | TokenEvent) -> None:
        """Hand on what the child said, unless nobody listens any more."""
        if not self.abandoned:
            self._send.send_nowait(said)

    def die(self, cause: str) -> None:
        """The child is gone; what it said before is still heard."""
        self._death = cause
        self._send.close()

    async def wait_accepted(self) -> None:
        """Return when the child has taken the prompt; PromptRefused or EngineDead if it won't."""
        match await self._next():
            case Refused(reason=reason):
                raise PromptRefused(reason)
            case _:
                return

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._over:
            raise StopAsyncIteration
        event = await self._next()
        if not isinstance(event, TokenEvent):
            raise EngineDead("the engine spoke out of turn")
        self._over = event.finish_reason is not None
        return event

    async def _next(self) -> Accepted | Refused | TokenEvent:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise EngineDead(self._death or "the engine ended") from None


class Child:
    """One life of the engine process."""

    def __init__(
        self, config: EngineConfig, *, gauge: SpeedGauge, on_ready: Callable[[Ready], None]
    ) -> None:
        self.ready: Ready | None = None
        self.calls: dict[str, Call] = {}
        self.pid: int | None = None
        self._config = config
        self._gauge = gauge
        self._on_ready = on_ready
        self._loaded = trio.Event()
        self._log_ended = trio.Event()
        self._cause: str | None = None
        self._heard = False
        self._ping_open = False
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        # At most one Generate and one Cancel per call, a Load and an open Ping: never full.
        self._outbox, self._to_write = trio.open_memory_channel[bytes](2 * _MAX_CALLS + 2)

    # -- what the engine does with it -------------------------------------------------------------

    def submit(self, request: GenerationRequest, *, window: int, waits: bool) -> Call:
        """Send a request in; PromptRefused if it is too large to be sent at all."""
        try:
            frame = encode(Generate(request))
        except FrameError as exc:
            raise PromptRefused(f"The prompt cannot be taken: {exc}.") from exc
        timing = Timing(asked=trio.current_time(), waited=waits)
        call = Call(request, window=window, timing=timing)
        self.calls[request.id] = call
        self._outbox.send_nowait(frame)
        return call

    def abandon(self, call: Call) -> None:
        """Cancel a call that nobody listens to any more; harmless if it is over."""
        call.abandoned = True
        if self.calls.get(call.request_id) is call:
            self._outbox.send_nowait(encode(Cancel(call.request_id)))

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
        self._outbox.send_nowait(encode(Load(self._config.model_dump_json())))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, process.stdin)
            nursery.start_soon(self._log, process.stderr)
            nursery.start_soon(self._watch, nursery.cancel_scope)
            await self._read(process.stdout)
            with trio.move_on_after(_LAST_WORDS_S):
                await self._log_ended.wait()
            nursery.cancel_scope.cancel()

    async def _write(self, stdin: trio.abc.SendStream) -> None:
        try:
            async for frame in self._to_write:
                await stdin.send_all(frame)
        except trio.BrokenResourceError:
            pass  # the reader notices the same end, and knows more

    async def _read(self, stdout: trio.abc.ReceiveStream) -> None:
        decoder = FrameDecoder()
        try:
            async for data in stdout:
                self._heard = True
                for frame in decoder.feed(data):
                    self._hear(frame)
        except FrameError as exc:
            self._cause = f"the engine process is broken: {exc}"

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
        if text := line[:_LOG_LINE_BYTES].decode(errors="replace").strip():
            self._last_lines.append(text)
            logger.info("engine process %s: %s", self.pid, text)

    async def _watch(self, everything: trio.CancelScope) -> None:
        """End the conversation with a child that does not load in time or falls silent."""
        with trio.move_on_after(self._config.load_timeout_s):
            await self._loaded.wait()
        if self.ready is None:
            self._cause = f"the model did not load within {self._config.load_timeout_s:g} s"
            everything.cancel()
            return
        interval = min(self._config.ping_interval_s, self._config.hang_timeout_s / 2)
        silent = 0.0
        # Silence is counted in intervals in which nothing was heard, not by the clock: when it is
        # our own loop that was held up, the child is not to blame.
        while silent < self._config.hang_timeout_s:
            self._heard = False
            if not self._ping_open:
                self._ping_open = True
                self._outbox.send_nowait(encode(Ping(1)))
            await trio.sleep(interval)
            silent = 0.0 if self._heard else silent + interval
        self._cause = f"the step loop was silent for {self._config.hang_timeout_s:g} s: hung"
        everything.cancel()

    # -- what the child says ----------------------------------------------------------------------

    def _hear(self, frame: Frame) -> None:
        match frame:
            case StepFrame(events=events):
                for event in events:
                    self._hear_event(event)
            case Accepted(request_id=request_id):
                if call := self._call(request_id):
                    call.deliver(frame)
            case Refused(request_id=request_id):
                if call := self._call(request_id):
                    del self.calls[request_id]
                    call.deliver(frame)
            case Pong(number=number):
                self._ping_open = self._ping_open and number == 0
            case Ready():
                self.ready = frame
                self._loaded.set()
                self._on_ready(frame)
            case LoadFailed(reason=reason):
                self._cause = reason
            case _:
                raise FrameError(f"{type(frame).__name__} is not the child's to say")

    def _hear_event(self, event: TokenEvent) -> None:
        if call := self._call(event.request_id):
            self._gauge.tokens(call.timing, len(event.token_ids), now=trio.current_time())
            if event.finish_reason is not None:
                del self.calls[event.request_id]
                self._gauge.finished(call.timing)
            call.deliver(event)

    def _call(self, request_id: str) -> Call | None:
        call = self.calls.get(request_id)
        if call is None:
            logger.warning("the engine speaks of a request that it does not have: %s", request_id)
        return call

    def _end_calls(self, returncode: int | None) -> None:
        if self._cause is None:
            self._cause = _obituary(returncode, list(self._last_lines))
        calls, self.calls = self.calls, {}
        self.ready = None
        for call in calls.values():
            call.die(self._cause)


def _obituary(returncode: int | None, last_lines: list[str]) -> str:
    """Why a child is gone that did not say it."""
    if returncode is not None and returncode < 0:
        name = signal.Signals(-returncode).name
        hint = " (the system does this when memory runs out)" if name == "SIGKILL" else ""
        return f"the engine process was ended by {name}{hint}"
    last = f": {last_lines[-1]}" if last_lines else ""
    return f"the engine process exited with status {returncode}{last}"
