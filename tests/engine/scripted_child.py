"""A child that speaks the frames and has no model: what it does stands in the prompt.

Run as a process in the place of `pinaivu_node.engine.child`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pinaivu_node.engine import frames
from pinaivu_node.engine.types import (
    Alternative,
    Embeddings,
    FinishReason,
    StepFrame,
    TokenEvent,
    TokenLogprob,
)

CAPACITY = 4


def say(frame) -> None:
    data = memoryview(frames.encode(frame))
    while data:
        data = data[os.write(1, data) :]


def heard():
    """Every frame from the daemon; None where there is none at the moment."""
    os.set_blocking(0, False)
    decoder = frames.FrameDecoder()
    while True:
        try:
            data = os.read(0, 65536)
        except BlockingIOError:
            yield None
            continue
        if not data:
            sys.exit(0)
        yield from decoder.feed(data)


def event(request, number, *, index=0, last=False) -> TokenEvent:
    logprobs = ()
    if request.sampling.logprobs is not None:
        row = Alternative(number, b"x", -0.5)
        logprobs = (TokenLogprob(row, (row,) * request.sampling.logprobs),)
    return TokenEvent(
        request.id,
        (number,),
        f"{time.monotonic()} " if request.prompt == "clock" else "x",
        input_tokens=10,
        cached_tokens=4,
        finish_reason=FinishReason.LENGTH if last else None,
        index=index,
        logprobs=logprobs,
    )


def load(frame) -> None:
    import json

    hold = Path(json.loads(frame.config)["model"]) / "hold"
    if hold.exists():
        say(frames.Loading(0.5, "reading weights"))
    while hold.exists():
        time.sleep(0.005)
    say(frames.Ready("none", "none", CAPACITY, 1000, 100.0, 20, kv_blocks=64))


def misbehave(prompt: str, request) -> None:
    match prompt:
        case "raise":
            raise RuntimeError("the device is lost")
        case "abort":
            os.write(2, b"terminate called after throwing an instance of 'Trouble'\n")
            os.abort()
        case "garbage":
            os.write(1, b"\xff" * 40)
        case "stray":
            say(StepFrame((event(request, 0, index=7),)))
        case "gauges":
            say(StepFrame((event(request, 0), event(request, 0, index=1))))
            say(frames.Gauges(3, 1, 30, 1000, 600, 3, 12.5, 500.0, 100.0, 2000))


def main() -> None:
    running: dict[str, object] = {}
    numbers: dict[str, int] = {}
    for frame in heard():
        match frame:
            case None:
                step(running, numbers)
            case frames.Load():
                load(frame)
            case frames.Ping(number=number):
                say(frames.Pong(number))
            case frames.Cancel(request_id=name):
                cancel(name, running.pop(name, None))
            case _:
                begin(frame, running, numbers)


def begin(frame, running, numbers) -> None:
    match frame:
        case frames.Generate(request=request) if request.prompt == "full":
            say(frames.Refused(request.id, "no blocks", frames.RefusalKind.FULL))
        case frames.Generate(request=request) if request.prompt == "deaf":
            pass  # whoever prepares requests hangs; steps are made, and pings answered
        case frames.Generate(request=request):
            say(frames.Accepted(request.id, 10))
            running[request.id], numbers[request.id] = request, 0
            misbehave(request.prompt, request)
        case frames.Embed(request=request) if "never" in request.inputs:
            pass
        case frames.Embed(request=request):
            vectors = tuple((float(len(text)),) * 8000 for text in request.inputs)
            for part in frames.embedded(request.id, Embeddings(vectors, 5)):
                say(part)


def cancel(name, request) -> None:
    if request is None:
        say(frames.Refused(name, "cancelled"))
        return
    events = [
        TokenEvent(name, (), "", 10, finish_reason=FinishReason.CANCELLED, index=index)
        for index in range(request.sampling.n)
    ]
    say(StepFrame(tuple(events)))


def step(running, numbers) -> None:
    """One token for every answer of all that want some."""
    said = []
    for name, request in list(running.items()):
        if request.prompt in ("wait", "gauges"):
            continue
        numbers[name] += 1
        last = numbers[name] == request.sampling.max_tokens
        said += [
            event(request, numbers[name], index=index, last=last)
            for index in range(request.sampling.n)
        ]
        if last:
            del running[name]
    if said:
        say(StepFrame(tuple(said)))
    if not said or any(request.prompt == "clock" for request in running.values()):
        time.sleep(0.002)


if __name__ == "__main__":
    main()
