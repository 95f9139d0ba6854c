"""Our own step loop, without the process around it."""

from __future__ import annotations

import queue
import time
from pathlib import Path
from typing import Any, Final

from scripts.benchmarks.engine.contenders import prose
from scripts.benchmarks.engine.contenders.turns import (
    Handler,
    Stamps,
    prompts,
    take_turns,
)

MAX_RUNNING: Final = 32
LONG_TOKENS: Final = 4000


class Loop:
    """A model and its step loop; requests in, steps on demand."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from pinaivu_node.engine.batching.preparation import Preparation
        from pinaivu_node.engine.batching.step_loop import StepLoop
        from pinaivu_node.engine.config import EngineConfig
        from pinaivu_node.engine.model.loading import load as load_model

        config = EngineConfig(
            model=Path(settings["model"]),
            device="cpu",
            dtype=settings["dtype"],
            threads=settings["threads"],
            kv_cache_gb=1.5,
            **settings.get("config", {}),
        )
        began, began_cpu = time.perf_counter(), time.process_time()
        model = load_model(config, lambda _progress, _what: None)
        self.load_seconds = time.perf_counter() - began
        self.load_cpu_seconds = time.process_time() - began_cpu
        self._preparation = Preparation(model, speculates=config.speculate != 0)
        self._preparation.warm_up()
        self._frames: list[Any] = []
        self._loop = StepLoop(
            model,
            config,
            max_running=MAX_RUNNING,
            inbox=queue.SimpleQueue(),
            preparing=set(),
            say=self._frames.append,
        )
        for _ in range(2):
            list(self._loop.answer(self._preparation.warm_up_answer()))
        self._frames.clear()

    def ask(self, name: str, prompt: Any, *, tokens: int, **more: Any) -> None:
        """Put a greedy request into the loop; ValueError if it is refused."""
        from pinaivu_node.engine.batching.preparation import Prepared
        from pinaivu_node.engine.types import GenerationRequest, SamplingParams

        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(name, prompt, sampling, **more)
        prepared = self._preparation.prepare(request)
        if not isinstance(prepared, Prepared):
            raise ValueError(  # noqa: TRY004 - it is the request that is wrong
                f"{name} is refused: {prepared.reason}"
            )
        self._loop.obey(prepared)

    def cancel(self, name: str) -> None:
        """End a request."""
        from pinaivu_node.engine.frames import Cancel

        self._loop.obey(Cancel(name))

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self._loop.busy

    def step(self) -> dict[str, int]:
        """Make a step: how many tokens each request got."""
        from pinaivu_node.engine.types import StepFrame

        self._frames.clear()
        self._loop.step()
        got: dict[str, int] = {}
        for frame in self._frames:
            if isinstance(frame, StepFrame):
                for event in frame.events:
                    got[event.request_id] = got.get(event.request_id, 0) + len(event.token_ids)
        return got

    def run(self, streams: int) -> dict[str, Any]:
        """Step until all is answered: what was made from when all streamed till the first ended."""
        stamps = Stamps()
        all_stream = False
        heard: set[str] = set()
        while self.busy:
            got = self.step()
            heard |= set(got)
            if all_stream and len(got) == streams:
                stamps.stamp(sum(got.values()))
            elif not all_stream and len(heard) == streams:
                stamps.stamp(0)
                all_stream = True
        return stamps.since(0)


class Orders:
    """Everything that is measured of one loop alone."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._loop = Loop(settings)

    def decode(self, *, batch: int, tokens: int, length: int, seed: int) -> dict[str, Any]:
        """Prompts without sense, and what is made once all of them stream."""
        for number, prompt in enumerate(prompts(batch, length=length, seed=seed)):
            self._loop.ask(f"r{number}", tuple(prompt), tokens=tokens)
        return self._loop.run(batch)

    def loading(self) -> dict[str, Any]:
        """How long this process took to load the model, after its imports."""
        return {"wall_s": self._loop.load_seconds, "cpu_s": self._loop.load_cpu_seconds}

    def first_token(self, *, shared: int, own: int, seed: int) -> dict[str, Any]:
        """Cold, then warm: two prompts that begin alike."""
        head, *tails = prompts(3, length=shared, seed=seed)
        seconds = []
        for number, tail in enumerate(tails):
            began = time.process_time()
            self._loop.ask(f"f{number}", (*head, *tail[:own]), tokens=1)
            while self._loop.busy:
                self._loop.step()
            seconds.append(time.process_time() - began)
        return {"cold_s": seconds[0], "warm_s": seconds[1]}

    def joining(self, *, streams: int, idle_steps: int, seed: int) -> dict[str, Any]:
        """Seconds between tokens of a stream, before and while a long prompt is computed."""
        for number, prompt in enumerate(prompts(streams, length=64, seed=seed)):
            self._loop.ask(f"s{number}", tuple(prompt), tokens=4000)
        while len(self._loop.step()) < streams:
            pass
        idle = [_timed_step(self._loop)[0] for _ in range(idle_steps)]
        (long,) = prompts(1, length=LONG_TOKENS, seed=seed + 1)
        self._loop.ask("long", tuple(long), tokens=1)
        joined: list[float] = []
        while True:
            seconds, got = _timed_step(self._loop)
            joined.append(seconds)
            if "long" in got:
                break
        for number in range(streams):
            self._loop.cancel(f"s{number}")
        return {"idle_s": idle, "joined_s": joined}

    def constrained(self, *, batch: int, tokens: int, bound: int) -> dict[str, Any]:
        """`bound` of the streams under a JSON schema."""
        for number in range(batch):
            more = {"constraint": prose.constraint()} if number < bound else {}
            self._loop.ask(f"c{number}", prose.chat(prose.LISTS[number]), tokens=tokens, **more)
        return self._loop.run(batch)

    def talk(self, *, kind: str, batch: int, tokens: int) -> dict[str, Any]:
        """Prose that is new, or that repeats what is in the prompt."""
        for number in range(batch):
            self._loop.ask(f"t{number}", prose.chat(prose.KINDS[kind][number]), tokens=tokens)
        return self._loop.run(batch)

    def bandwidth(self) -> dict[str, Any]:
        """Of the core that this process is on."""
        from scripts.benchmarks.engine.contenders.bandwidth import read_bandwidth

        return {"bytes_per_s": read_bandwidth()}


def load(settings: dict[str, Any]) -> dict[str, Handler]:
    """The model in its folder."""
    import torch

    torch.set_num_threads(settings["threads"])
    orders = Orders(settings)
    return {name: getattr(orders, name) for name in vars(Orders) if not name.startswith("_")}


def _timed_step(loop: Loop) -> tuple[float, dict[str, int]]:
    began = time.process_time()
    got = loop.step()
    return time.process_time() - began, got


if __name__ == "__main__":
    take_turns(load)
