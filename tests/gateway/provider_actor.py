"""A provider that does with each dispatch what its script says, lies included."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from pinaivu_node.mesh.mesh import FrameStream, Mesh, MeshError
from pinaivu_node.protocol.ids import PeerId, RequestId, digest_of
from pinaivu_node.protocol.inference import (
    TO_PROVIDER,
    Accept,
    Cancel,
    Dispatch,
    Done,
    Finish,
    Refuse,
    RefuseReason,
    TokenDelta,
    Tokens,
)
from pinaivu_node.protocol.market import Proof, SegmentOutcome, Voucher
from pinaivu_node.protocol.money import TokenUsage
from pinaivu_node.protocol.signing import Envelope, Signer, open_untrusted
from pinaivu_node.protocol.topics import INFERENCE
from pinaivu_node.protocol.wire import Message, decode_untrusted, encode

WEIGHTS = digest_of(b"weights")


def seed_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def signer_of(name: str) -> Signer:
    return Signer(seed_of(name))


def peer_of(name: str) -> PeerId:
    return signer_of(name).peer_id


class Job:
    """One dispatch at a provider, and what its script may say about it."""

    def __init__(self, provider: ProviderActor, dispatch: Dispatch, stream: FrameStream) -> None:
        self.provider = provider
        self.dispatch = dispatch
        self.stream = stream
        self.cancelled = trio.Event()
        self.position = 0
        self._text = hashlib.sha256()

    async def say(self, message: Message) -> None:
        await self.stream.send(encode(message))

    async def accept(self) -> None:
        await self.say(Accept(request_id=self.dispatch.request_id))

    async def refuse(self, reason: RefuseReason, explanation: str = "no") -> None:
        await self.say(
            Refuse(request_id=self.dispatch.request_id, reason=reason, explanation=explanation)
        )

    async def tokens(self, *texts: str, position: int | None = None) -> None:
        """One frame with a token for each text."""
        delta = TokenDelta(
            request_id=self.dispatch.request_id,
            position=self.position if position is None else position,
            token_ids=tuple(range(len(texts))),
            text="".join(texts),
        )
        self.position += len(texts)
        self._text.update(delta.text.encode())
        await self.say(Tokens(deltas=(delta,)))

    def proof(self, **changes: Any) -> Proof:
        fields = {
            "request_id": self.dispatch.request_id,
            "provider": self.provider.signer.peer_id,
            "gateway": peer_of("gateway"),
            "model_digest": WEIGHTS,
            "usage": TokenUsage(input=11, cached_input=2, output=self.position),
            "output_hash": f"sha256:{self._text.hexdigest()}",
            "token": self.dispatch.token.digest,
            "outcome": SegmentOutcome.COMPLETED,
            "engine_ttft_ms": 5,
            "duration_ms": 50,
            "voucher": None,
        }
        return Proof(**{**fields, **changes})

    async def done(
        self, finish: Finish = Finish.STOP, *, signer: Signer | None = None, **changes: Any
    ) -> None:
        envelope = (signer or self.provider.signer).seal(self.proof(**changes))
        await self.say(Done(request_id=self.dispatch.request_id, finish=finish, proof=envelope))


Script = Callable[[Job], Awaitable[None]]


async def answer_well(job: Job) -> None:
    await job.accept()
    for text in ("The ", "sea ", "is ", "wide."):
        await job.tokens(text)
    await job.done()


async def stop_when_cancelled(job: Job) -> None:
    """A token every 20 ms until it is told to stop; then the proof of what was sent."""
    await job.accept()
    while not job.cancelled.is_set():
        await job.tokens("x")
        with trio.move_on_after(0.02):
            await job.cancelled.wait()
    await job.done(Finish.CANCELLED, outcome=SegmentOutcome.CANCELLED)


class ProviderActor:
    """Follows a script for every dispatch."""

    def __init__(self, mesh: Mesh, name: str, script: Script) -> None:
        self.mesh = mesh
        self.signer = signer_of(name)
        self.script = script
        self.jobs: dict[RequestId, Job] = {}
        self.vouchers: list[Voucher] = []
        self.cancelled_at: float | None = None
        self.streams = 0
        mesh.handle(INFERENCE, self._serve)

    async def _serve(self, stream: FrameStream) -> None:
        self.streams += 1
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    message = decode_untrusted(await stream.receive(), *TO_PROVIDER)
                    self._take(message, stream, nursery)
            except MeshError:
                nursery.cancel_scope.cancel()

    def _take(self, message: Message, stream: FrameStream, nursery: trio.Nursery) -> None:
        if isinstance(message, Dispatch):
            job = self.jobs[message.request_id] = Job(self, message, stream)
            nursery.start_soon(self._run, job)
        elif isinstance(message, Cancel):
            self.cancelled_at = trio.current_time()
            self.jobs[message.request_id].cancelled.set()
        elif isinstance(message, Envelope):
            self.vouchers.append(open_untrusted(message, Voucher, signer=peer_of("gateway")))

    async def _run(self, job: Job) -> None:
        with contextlib.suppress(MeshError):
            await self.script(job)
