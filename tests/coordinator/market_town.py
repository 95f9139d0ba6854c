"""A coordinator on the memory mesh, and peers that speak the protocol by hand."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from pinaivu_node.coordinator.config import CoordinatorConfig
from pinaivu_node.coordinator.service import Coordinator, serve_coordinator
from pinaivu_node.coordinator.store import Store, open_store, run_inline
from pinaivu_node.mesh.memory import MemoryNetwork
from pinaivu_node.mesh.mesh import FrameStream, Mesh
from pinaivu_node.protocol.draw import draw
from pinaivu_node.protocol.ids import PeerId, RequestId, UnixMilliseconds, digest_of, request_id_of
from pinaivu_node.protocol.market import (
    TO_PEER,
    Announce,
    Bid,
    Delivery,
    DispatchToken,
    Heartbeat,
    Hello,
    JobKind,
    JobOffer,
    JobTerms,
    ModelLoad,
    ModelOffer,
    Outcome,
    Pass,
    Preference,
    Proof,
    Role,
    Roster,
    SegmentOutcome,
    SegmentReport,
    Voucher,
    Welcome,
)
from pinaivu_node.protocol.money import PriceList, TokenUsage
from pinaivu_node.protocol.signing import Envelope, Signer, open_untrusted
from pinaivu_node.protocol.topics import MARKET, jobs_topic
from pinaivu_node.protocol.wire import Message, decode_untrusted, encode

START = 1_700_000_000_000
MODEL = "smollm2:135m"
DIGEST = digest_of(b"weights")
PRICES = PriceList(input=50_000_000, cached_input=12_500_000, output=200_000_000)
USAGE = TokenUsage(input=100, cached_input=0, output=50)
TEXT = digest_of(b"the answer")


def clock() -> UnixMilliseconds:
    return UnixMilliseconds(START + round(1000 * trio.current_time()))


def seed_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def signer_of(name: str) -> Signer:
    return Signer(seed_of(name))


def request_id(number: int = 1) -> RequestId:
    return request_id_of(number.to_bytes(16))


def make_terms(number: int = 1, **changes: Any) -> JobTerms:
    terms = JobTerms(
        request_id=request_id(number),
        kind=JobKind.CHAT,
        model=MODEL,
        model_digest=None,
        input_estimate=100,
        input_limit=200,
        output_estimate=50,
        output_limit=100,
        max_prices=None,
        preference=Preference.BALANCED,
        sampling_digest=digest_of(b"sampling"),
        input_commitment=digest_of(b"prompt"),
        deadline=START + 60_000,
    )
    return terms.model_copy(update=changes)


def make_offer(model: str = MODEL, **changes: Any) -> ModelOffer:
    offer = ModelOffer(
        model=model,
        digest=DIGEST,
        context_window=2048,
        capacity=4,
        prices=PRICES,
        kinds=(JobKind.CHAT,),
        licence="apache-2.0",
        owner="nobody",
    )
    return offer.model_copy(update=changes)


def make_bid(signer: Signer, number: int = 1, **changes: Any) -> Bid:
    bid = Bid(
        request_id=request_id(number),
        bidder=signer.peer_id,
        model_digest=DIGEST,
        prices=PRICES,
        context_window=2048,
        warm_tokens=0,
        expires_at=START + 3_600_000,
    )
    return bid.model_copy(update=changes)


def make_proof(token: Envelope, signer: Signer, **changes: Any) -> Proof:
    dispatch = DispatchToken.from_body_untrusted(token.body)
    proof = Proof(
        request_id=dispatch.request_id,
        provider=signer.peer_id,
        gateway=dispatch.gateway,
        model_digest=dispatch.model_digest,
        usage=USAGE,
        output_hash=TEXT,
        token=token.digest,
        outcome=SegmentOutcome.COMPLETED,
        engine_ttft_ms=10,
        duration_ms=500,
        voucher=None,
    )
    return proof.model_copy(update=changes)


def make_report(provider: PeerId, **changes: Any) -> SegmentReport:
    report = SegmentReport(
        provider=provider,
        usage=USAGE,
        output_hash=TEXT,
        outcome=SegmentOutcome.COMPLETED,
        ttft_ms=20,
        duration_ms=510,
    )
    return report.model_copy(update=changes)


def make_delivery(
    gateway: PeerId, *reports: SegmentReport, number: int = 1, **changes: Any
) -> Delivery:
    delivery = Delivery(
        request_id=request_id(number),
        gateway=gateway,
        segments=reports,
        outcome=Outcome.COMPLETED,
        output_hash=TEXT,
    )
    return delivery.model_copy(update=changes)


def make_voucher(gateway: Signer, provider: PeerId, tokens: int, number: int = 1) -> Envelope:
    return gateway.seal(
        Voucher(request_id=request_id(number), provider=provider, output_tokens=tokens)
    )


class Peer:
    """One end of a market stream, and everything that came in on it."""

    def __init__(self, mesh: Mesh, signer: Signer, stream: FrameStream) -> None:
        self.mesh = mesh
        self.signer = signer
        self.stream = stream
        self.rosters: list[Roster] = []
        self.heartbeats: list[Heartbeat] = []
        self._send, self._receive = trio.open_memory_channel[Message](10_000)

    @property
    def peer_id(self) -> PeerId:
        return self.signer.peer_id

    async def say(self, message: Message) -> None:
        await self.stream.send(encode(message))

    async def state(self, message: Message) -> None:
        await self.say(self.signer.seal(message))

    async def heard(self, *kinds: type[Message]) -> Any:
        """The next message; it must be one of these kinds."""
        with trio.fail_after(100):
            message = await self._receive.receive()
        assert isinstance(message, kinds), message
        return message

    async def heard_nothing(self, seconds: float = 1) -> None:
        with trio.move_on_after(seconds):
            raise AssertionError(await self._receive.receive())

    async def listen(self) -> None:
        while True:
            message = decode_untrusted(await self.stream.receive(), *TO_PEER)
            if isinstance(message, Roster):
                self.rosters.append(message)
            elif isinstance(message, Heartbeat):
                self.heartbeats.append(message)
            else:
                self._send.send_nowait(message)

    async def beat(self, loads: Callable[[], tuple[ModelLoad, ...]] = tuple) -> None:
        for sequence in range(1_000_000):
            await self.say(Heartbeat(sequence=sequence, loads=loads()))
            await trio.sleep(1)


@dataclass
class Provider(Peer):
    """Bids on everything it is offered, as `answer` says."""

    mesh: Mesh
    signer: Signer
    stream: FrameStream
    offer: ModelOffer
    answer: Callable[[JobOffer], Message | None] | None = None
    offers: list[JobOffer] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.mesh, self.signer, self.stream)

    async def bid(self, coordinator: PeerId, *, task_status: Any) -> None:
        async with self.mesh.subscribe(jobs_topic(self.offer.model)) as deliveries:
            task_status.started()
            async for delivery in deliveries:
                envelope = decode_untrusted(delivery.payload, Envelope)
                offer = open_untrusted(envelope, JobOffer, signer=coordinator)
                if draw(self.peer_id, offer.terms.request_id) >= offer.threshold:
                    continue
                self.offers.append(offer)
                answer = self.answer(offer) if self.answer else self.usual(offer)
                if answer is not None:
                    await self.state(answer)

    def usual(self, offer: JobOffer, **changes: Any) -> Bid:
        return make_bid(
            self.signer,
            prices=self.offer.prices,
            model_digest=self.offer.digest,
            request_id=offer.terms.request_id,
            **changes,
        )

    def passing(self, reason: Any) -> Callable[[JobOffer], Pass]:
        return lambda offer: Pass(
            request_id=offer.terms.request_id, bidder=self.peer_id, reason=reason
        )


class Town:
    """A memory network with one coordinator and whoever moves in."""

    def __init__(self, network: MemoryNetwork, mesh: Mesh, nursery: trio.Nursery) -> None:
        self.network = network
        self.mesh = mesh
        self.nursery = nursery
        self.coordinator: Coordinator
        self.store: Store

    @property
    def peer_id(self) -> PeerId:
        return self.mesh.peer_id

    async def join(self, name: str) -> Mesh:
        """A peer that is connected to the coordinator and stays until the end."""

        async def live(*, task_status: Any) -> None:
            async with self.network.join(seed_of(name)) as mesh:
                await mesh.dial(self.mesh.addresses[0])
                task_status.started(mesh)
                await trio.sleep_forever()

        mesh: Mesh = await self.nursery.start(live)
        return mesh

    async def hello(self, mesh: Mesh, role: Role) -> FrameStream:
        stream = await mesh.open(self.peer_id, MARKET)
        hello = Hello(role=role, addresses=mesh.addresses, software="test/1")
        await stream.send(encode(hello))
        return stream

    async def gateway(self, name: str = "gateway", *, credit: int = 10**12) -> Peer:
        mesh = await self.join(name)
        if credit:
            await self.coordinator.deposit(mesh.peer_id, credit, key=name)
        gateway = Peer(mesh, signer_of(name), await self.hello(mesh, Role.GATEWAY))
        await self._settle_in(gateway)
        return gateway

    async def provider(
        self,
        name: str,
        *,
        answer: Callable[[JobOffer], Message | None] | None = None,
        **changes: Any,
    ) -> Provider:
        mesh = await self.join(name)
        offer = make_offer(**changes)
        stream = await self.hello(mesh, Role.PROVIDER)
        provider = Provider(mesh, signer_of(name), stream, offer, answer)
        await self._settle_in(provider)
        await self.nursery.start(provider.bid, self.peer_id)
        await provider.say(Announce(models=(offer,)))
        return provider

    async def _settle_in(self, peer: Peer) -> None:
        self.nursery.start_soon(quietly, peer.listen)
        self.nursery.start_soon(quietly, peer.beat)
        await peer.heard(Welcome)


async def quietly(work: Callable[[], Any]) -> None:
    """A peer whose stream ends stops; what the coordinator did is what a test looks at."""
    try:
        await work()
    except Exception:  # noqa: BLE001 - any mesh error
        return


DEFAULT_CONFIG = CoordinatorConfig()


@asynccontextmanager
async def open_town(
    database: str, config: CoordinatorConfig = DEFAULT_CONFIG, *, seed: int = 1
) -> AsyncIterator[Town]:
    async with (
        MemoryNetwork(seed=seed, latency=0.005) as network,
        trio.open_nursery() as nursery,
        network.join(seed_of("coordinator")) as mesh,
        open_store(database, run_sync=run_inline) as store,
    ):
        town = Town(network, mesh, nursery)
        async with trio.open_nursery() as services:
            town.store = store
            town.coordinator = await services.start(
                partial(
                    serve_coordinator,
                    mesh,
                    store,
                    signer_of("coordinator"),
                    config,
                    clock=clock,
                )
            )
            yield town
            services.cancel_scope.cancel()
        nursery.cancel_scope.cancel()
