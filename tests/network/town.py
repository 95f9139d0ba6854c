"""A whole network in one process, every role its real code, under a virtual clock."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import trio

from pinaivu_gateway.jobs import Job, JobFinished, JobOrder, Market, TextDelta
from pinaivu_gateway.market import MarketConfig, open_market
from pinaivu_node.coordinator.config import CoordinatorConfig
from pinaivu_node.coordinator.service import Coordinator, serve_coordinator
from pinaivu_node.coordinator.store import Store, open_store, run_inline, sqlite_url
from pinaivu_node.engine.synthetic import SyntheticEngine
from pinaivu_node.engine.types import Engine
from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.memory import MemoryNetwork
from pinaivu_node.mesh.mesh import Mesh
from pinaivu_node.protocol.ids import (
    Digest,
    ModelName,
    PeerId,
    RequestId,
    UnixMilliseconds,
    digest_of,
    request_id_of,
)
from pinaivu_node.protocol.inference import ChatTurn, Prompt, Sampling
from pinaivu_node.protocol.market import JobKind
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.protocol.receipt import ReceiptReply
from pinaivu_node.protocol.signing import Envelope, Signer
from pinaivu_node.provider.config import ProviderConfig
from pinaivu_node.provider.service import Provider, serve_provider
from pinaivu_node.provider.shelf import ServedModel
from pinaivu_node.verification import Check, Evidence, Expectation, Verdict, verify

EPOCH = 1_800_000_000_000
MODEL = ModelName("smollm2:135m")
CREDIT = 10**12
WEIGHTS = digest_of(b"weights")


def seed_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def peer_of(name: str) -> PeerId:
    return Signer(seed_of(name)).peer_id


def clock() -> UnixMilliseconds:
    return UnixMilliseconds(EPOCH + round(1000 * trio.current_time()))


class MemoryOutbox:
    """Deliveries that outlive their gateway's mesh, as a database does."""

    def __init__(self) -> None:
        self.kept: dict[RequestId, Envelope] = {}

    async def put(self, request_id: RequestId, delivery: Envelope) -> None:
        await trio.lowlevel.checkpoint()
        self.kept[request_id] = delivery

    async def remove(self, request_id: RequestId) -> None:
        await trio.lowlevel.checkpoint()
        self.kept.pop(request_id, None)

    async def waiting(self) -> list[tuple[RequestId, Envelope]]:
        await trio.lowlevel.checkpoint()
        return list(self.kept.items())


class Town:
    """Starts, kills and restarts the parties of one network; each lives until the town ends."""

    def __init__(self, network: MemoryNetwork, nursery: trio.Nursery, folder: Path) -> None:
        self.network = network
        self._nursery = nursery
        self._folder = folder
        self._requests = count(1)
        self.outboxes: dict[str, MemoryOutbox] = {}

    @property
    def coordinator_address(self) -> str:
        return f"/memory/{peer_of('coordinator')}/p2p/{peer_of('coordinator')}"

    async def coordinator(self, **config: Any) -> Coordinator:
        config.setdefault("welcome_credit", CREDIT)
        return await self._nursery.start(self._coordinate, CoordinatorConfig(**config))

    async def provider(
        self,
        name: str,
        *,
        output_price: int = 200_000_000,
        engine: Engine | None = None,
        digest: Digest = WEIGHTS,
    ) -> Provider:
        served = ServedModel(
            engine=engine or SyntheticEngine(tokens_per_second=50, ttft_ms=40, capacity=4),
            model=MODEL,
            digest=digest,
            prices=PriceList(input=50_000_000, cached_input=10_000_000, output=output_price),
        )
        return await self._nursery.start(self._provide, name, served)

    async def gateway(self, name: str = "gateway") -> Market:
        return await self._nursery.start(self._sell, name)

    async def stranger(self, name: str) -> Mesh:
        """A mesh of somebody who speaks for himself."""
        return await self._nursery.start(self._loiter, name)

    def kill(self, name: str) -> None:
        self.network.crash(peer_of(name))

    def order(self, *, max_tokens: int = 20, **changes: Any) -> JobOrder:
        prompt = Prompt(
            nonce=bytes(16), turns=(ChatTurn(role="user", content="tell me of the sea"),)
        )
        fields: dict[str, Any] = {
            "request_id": request_id_of(next(self._requests).to_bytes(16)),
            "kind": JobKind.CHAT,
            "model": MODEL,
            "prompt": prompt,
            "sampling": Sampling(max_tokens=max_tokens, seed=7),
            "input_limit": 200,
            "input_estimate": 20,
            "output_limit": max_tokens,
            "output_estimate": max_tokens,
            "deadline_in": 60_000,
        }
        return JobOrder(**{**fields, **changes})

    # --- lives --------------------------------------------------------------------------------

    async def _coordinate(
        self, config: CoordinatorConfig, *, task_status: trio.TaskStatus[Coordinator]
    ) -> None:
        seed = seed_of("coordinator")
        url = sqlite_url(self._folder / "books.db")
        async with (
            open_store(url, run_sync=run_inline) as store,
            self.network.join(seed, MeshConfig(hub=True)) as mesh,
        ):
            self.store: Store = store
            await serve_coordinator(
                mesh, store, Signer(seed), config, clock=clock, task_status=task_status
            )

    async def _provide(
        self, name: str, served: ServedModel, *, task_status: trio.TaskStatus[Provider]
    ) -> None:
        seed = seed_of(name)
        config = ProviderConfig(proofs_folder=None)  # no threads under a virtual clock
        async with self.network.join(seed) as mesh:
            await serve_provider(
                mesh,
                Signer(seed),
                peer_of("coordinator"),
                self.coordinator_address,
                {served.model: served},
                config,
                clock=clock,
                task_status=task_status,
            )

    async def _sell(self, name: str, *, task_status: trio.TaskStatus[Market]) -> None:
        seed = seed_of(name)
        outbox = self.outboxes.setdefault(name, MemoryOutbox())
        async with (
            self.network.join(seed, MeshConfig(hub=True)) as mesh,
            open_market(
                mesh, Signer(seed), self.coordinator_address, outbox, MarketConfig(), clock=clock
            ) as market,
        ):
            task_status.started(market)
            await trio.sleep_forever()

    async def _loiter(self, name: str, *, task_status: trio.TaskStatus[Mesh]) -> None:
        async with self.network.join(seed_of(name)) as mesh:
            await mesh.dial(self.coordinator_address)
            task_status.started(mesh)
            await trio.sleep_forever()


async def spoken(job: Job) -> tuple[str, JobFinished]:
    """The whole text of a job that ends well, and its end."""
    text = ""
    async for event in job.events():
        match event:
            case TextDelta():
                text += event.text
            case JobFinished():
                return text, event
    raise AssertionError("the events of a job end with JobFinished")


async def settled(market: Market, order: JobOrder) -> ReceiptReply:
    reply = await market.receipt(order.request_id, wait_ms=20_000)
    assert reply.receipt is not None
    return reply


async def failed_checks(
    market: Market, order: JobOrder, *, answer: str | None = None, answers: tuple[str, ...] = ()
) -> list[Check]:
    """What a stranger who trusts nobody but the coordinator's key would object to."""
    reply = await settled(market, order)
    evidence = Evidence(
        receipt=reply.receipt,
        proofs=reply.proofs,
        delivery=reply.delivery,
        leaves=await market.bid_set(order.request_id),
    )
    expectation = Expectation(
        request_id=order.request_id,
        coordinator=peer_of("coordinator"),
        answers=answers if answer is None else (answer,),
    )
    checks = list(verify(evidence, expectation))
    assert len(checks) >= 8
    return [check for check in checks if check.verdict is Verdict.FAILS]


@asynccontextmanager
async def founded_in(folder: Path) -> AsyncIterator[Town]:
    async with (
        MemoryNetwork(seed=3, latency=0.005) as network,
        trio.open_nursery() as nursery,
    ):
        yield Town(network, nursery, folder)
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool], *, within: float = 10.0) -> None:
    """Wait, in virtual time, for something that the network will bring about."""
    with trio.fail_after(within):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event to wait on
            await trio.sleep(0.01)


settle_down = partial(trio.sleep, 2.0)
