"""An engine without a process around it: requests in, answers out, step by step."""

from __future__ import annotations

import queue
from dataclasses import dataclass, field
from pathlib import Path

from pinaivu_node.engine.batching.preparation import Preparation
from pinaivu_node.engine.batching.step_loop import StepLoop
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.frames import Accepted, Refused
from pinaivu_node.engine.model.loading import LoadedModel, load
from pinaivu_node.engine.types import (
    FinishReason,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
    StepFrame,
    TokenEvent,
    TokenLogprob,
)


@dataclass
class Said:
    """What one answer said so far."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: TokenEvent | None = None

    @property
    def finish(self) -> FinishReason | None:
        return None if self.last is None else self.last.finish_reason

    def hear(self, event: TokenEvent) -> None:
        assert self.finish is None, "an event after the last one"
        self.token_ids += event.token_ids
        self.text += event.text
        self.logprobs += event.logprobs
        self.last = event


class Solo:
    """One model in this very process; `answers` by (request id, index)."""

    def __init__(self, folder: Path, *, max_running: int = 8, adapt=None, **config) -> None:
        """`adapt` makes of a loaded model the one that is to run."""
        self.config = EngineConfig(**({"model": folder, "threads": 1, "device": "cpu"} | config))
        self.model: LoadedModel = load(self.config, lambda progress, what: None)
        if adapt is not None:
            self.model = adapt(self.model)
        self.preparation = Preparation(self.model, speculates=self.config.speculate != 0)
        self.inbox = queue.SimpleQueue()
        self.preparing: set[str] = set()
        self.frames = []
        self.loop = StepLoop(
            self.model,
            self.config,
            max_running=max_running,
            inbox=self.inbox,
            preparing=self.preparing,
            say=self._hear,
        )
        self.answers: dict[tuple[str, int], Said] = {}
        self.refused: dict[str, str] = {}
        self.steps = 0

    def _hear(self, frame) -> None:
        self.frames.append(frame)
        match frame:
            case StepFrame(events=events):
                for event in events:
                    self.answers[event.request_id, event.index].hear(event)
            case Refused(request_id=request_id, reason=reason):
                self.refused[request_id] = reason
            case Accepted():
                pass

    def ask(self, request: GenerationRequest) -> None:
        """Put a request before the loop; it is heard with the next step."""
        for index in range(request.sampling.n):
            self.answers[request.id, index] = Said()
        self.preparing.add(request.id)
        self.inbox.put(self.preparation.prepare(request))

    def step(self) -> None:
        while not self.inbox.empty():
            self.loop.obey(self.inbox.get())
        self.loop.step()
        self.steps += 1

    @property
    def busy(self) -> bool:
        return self.loop.busy or not self.inbox.empty()

    def run(self, *requests: GenerationRequest) -> list[Said]:
        """Ask, and step until all is answered; the first answer of each.  Raises PromptRefused."""
        for request in requests:
            self.ask(request)
        while self.busy:
            self.step()
        for request in requests:
            if request.id in self.refused:
                raise PromptRefused(self.refused.pop(request.id))
        return [self.answers[request.id, 0] for request in requests]


def request(
    prompt,
    *,
    id="r",  # noqa: A002
    resume=(),
    tenant=b"",
    constraint=None,
    tools=None,
    **sampling,
):
    """A greedy request for twenty tokens, unless it says otherwise."""
    params = SamplingParams(**({"max_tokens": 20, "temperature": 0.0} | sampling))
    return GenerationRequest(
        id, prompt, params, resume_token_ids=tuple(resume), tenant=tenant,
        constraint=constraint, tools=tools,
    )  # fmt: skip
