"""What one auction costs, with the coordinator's and the providers' real code in one process.

The mesh is the one in memory under a virtual clock, so that a thousand providers fit; time is
attributed by task: what runs under the coordinator's nursery is the coordinator's.
"""

from __future__ import annotations

import hashlib
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
import trio.testing

from pinaivu_node.coordinator.config import CoordinatorConfig
from pinaivu_node.coordinator.service import Coordinator, serve_coordinator
from pinaivu_node.coordinator.store import open_store, sqlite_url
from pinaivu_node.engine.synthetic import SyntheticEngine
from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.memory import MemoryNetwork
from pinaivu_node.mesh.mesh import FrameStream
from pinaivu_node.protocol.ids import ModelName, UnixMilliseconds, digest_of, request_id_of
from pinaivu_node.protocol.inference import Prompt, Sampling
from pinaivu_node.protocol.market import (
    TO_PEER,
    Award,
    Delivery,
    Hello,
    JobKind,
    JobRequest,
    JobTerms,
    Outcome,
    Preference,
    Role,
)
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.protocol.signing import Signer
from pinaivu_node.protocol.topics import MARKET
from pinaivu_node.protocol.wire import decode_untrusted, encode
from pinaivu_node.provider.config import ProviderConfig
from pinaivu_node.provider.service import serve_provider
from pinaivu_node.provider.shelf import ServedModel

ROUNDS: Final = 50
WARM_UP: Final = 5
MODEL: Final = ModelName("bench")
EPOCH: Final = 1_800_000_000_000


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(*, providers: int) -> dict[str, Any]:
    """Hold auctions among that many providers; medians and sums over the rounds."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    meter = _Meter()
    with tempfile.TemporaryDirectory(prefix="pnv-") as folder:
        return trio.run(
            partial(_hold_auctions, providers, Path(folder), meter),
            clock=clock,
            instruments=[meter],
        )


@dataclass(eq=False)
class _Meter(trio.abc.Instrument):
    """CPU seconds by owner, told apart by the nursery under which a task runs."""

    coordinator: trio.Nursery | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"coordinator": 0.0, "others": 0.0})
    _owners: dict[trio.lowlevel.Task, str] = field(default_factory=dict)
    _started: float = 0.0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        del task
        self._started = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        spent = time.thread_time() - self._started
        owner = self._owners.get(task)
        if owner is None:
            owner = self._owners[task] = self._owner(task)
        self.seconds[owner] += spent

    def _owner(self, task: trio.lowlevel.Task) -> str:
        nursery = task.parent_nursery
        while nursery is not None:
            if nursery is self.coordinator:
                return "coordinator"
            nursery = nursery.parent_task.parent_nursery
        return "others"

    def reset(self) -> None:
        self.seconds.update(coordinator=0.0, others=0.0)


async def _here(call: Callable[[], Any]) -> Any:
    """The store's calls on this thread: under a virtual clock there is nobody to wait for."""
    await trio.lowlevel.checkpoint()
    return call()


def _clock() -> UnixMilliseconds:
    return UnixMilliseconds(EPOCH + round(1000 * trio.current_time()))


def _seed(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


async def _hold_auctions(providers: int, folder: Path, meter: _Meter) -> dict[str, Any]:
    async with (
        open_store(sqlite_url(folder / "books.db"), run_sync=_here) as store,
        MemoryNetwork(seed=1, latency=0.002) as network,
        network.join(_seed("coordinator"), MeshConfig(hub=True)) as hub,
        network.join(_seed("gateway"), MeshConfig(hub=True)) as gateway,
        trio.open_nursery() as everyone,
        trio.open_nursery() as coordinators,
    ):
        meter.coordinator = coordinators
        config = CoordinatorConfig(welcome_credit=10**15)
        coordinator: Coordinator = await coordinators.start(
            partial(
                serve_coordinator, hub, store, Signer(_seed("coordinator")), config, clock=_clock
            )
        )
        for number in range(providers):
            await everyone.start(_provide, network, number, hub.addresses[0], folder)
        await gateway.dial(hub.addresses[0])
        market = _Gateway(await gateway.open(hub.peer_id, MARKET), Signer(_seed("gateway")))
        await market.hello()
        await trio.sleep(3)  # everyone has announced, and the gossip mesh has formed
        waits = []
        for number in range(WARM_UP + ROUNDS):
            if number == WARM_UP:
                meter.reset()
                before = coordinator.statistics()
            waits.append(await market.auction(number))
        after = coordinator.statistics()
        everyone.cancel_scope.cancel()
        coordinators.cancel_scope.cancel()
    bids = after.bids - before.bids
    passes = after.passes - before.passes
    return {
        "providers": providers,
        "cpu_ms": round(1000 * meter.seconds["coordinator"] / ROUNDS, 2),
        "cpu_ms_of_all_parties": round(1000 * sum(meter.seconds.values()) / ROUNDS, 2),
        "bids": round(bids / ROUNDS, 1),
        "passes": round(passes / ROUNDS, 1),
        # JobRequest, JobOffer as published, the answers, Award.
        "messages": round(3 + (bids + passes) / ROUNDS, 1),
        "offers_delivered_by_gossip": providers,
        "virtual_ms_p50": round(sorted(waits[WARM_UP:])[ROUNDS // 2], 1),
    }


async def _provide(
    network: MemoryNetwork,
    number: int,
    coordinator: str,
    folder: Path,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    seed = _seed(f"provider {number}")
    served = ServedModel(
        engine=SyntheticEngine(capacity=1024),
        model=MODEL,
        digest=digest_of(b"bench"),
        prices=PriceList(input=50_000_000, cached_input=10_000_000, output=200_000_000 + number),
    )
    config = ProviderConfig(proofs_folder=folder / f"proofs-{number}")
    async with network.join(seed) as mesh, trio.open_nursery() as nursery:
        await nursery.start(
            partial(
                serve_provider,
                mesh,
                Signer(seed),
                coordinator.rpartition("/p2p/")[2],
                coordinator,
                {MODEL: served},
                config,
                clock=_clock,
            )
        )
        task_status.started()
        await trio.sleep_forever()


class _Gateway:
    """Asks for jobs and gives them up unserved: what is measured ends with the award."""

    def __init__(self, stream: FrameStream, signer: Signer) -> None:
        self._stream = stream
        self._signer = signer

    async def hello(self) -> None:
        hello = Hello(role=Role.GATEWAY, addresses=(), software="bench")
        await self._stream.send(encode(hello))

    async def auction(self, number: int) -> float:
        """One JobRequest to its Award; how long it took in virtual milliseconds."""
        request_id = request_id_of(number.to_bytes(16))
        prompt = Prompt(nonce=bytes(16), text="measure")
        terms = JobTerms(
            request_id=request_id,
            kind=JobKind.COMPLETION,
            model=MODEL,
            model_digest=None,
            input_estimate=100,
            input_limit=400,
            output_estimate=100,
            output_limit=100,
            max_prices=None,
            preference=Preference.BALANCED,
            sampling_digest=Sampling(max_tokens=100).digest,
            input_commitment=prompt.commitment,
            deadline=UnixMilliseconds(_clock() + 60_000),
        )
        started = trio.current_time()
        await self._stream.send(encode(JobRequest(terms=terms)))
        while True:
            message = decode_untrusted(await self._stream.receive(), *TO_PEER)
            if isinstance(message, Award) and message.request_id == request_id:
                break
        waited = 1000 * (trio.current_time() - started)
        delivery = Delivery(
            request_id=request_id,
            gateway=self._signer.peer_id,
            segments=(),
            outcome=Outcome.CANCELLED,
            output_hash=digest_of(b""),
        )
        await self._stream.send(encode(self._signer.seal(delivery)))
        await trio.sleep(0.1)
        return waited
