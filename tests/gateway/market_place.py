"""A gateway's market as hand-written actors: a coordinator and providers that do as they are told.

They speak the protocol over the memory mesh and know nothing of the gateway's code, so that each
test can have them lie, fall silent or vanish at one exact point.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import trio
from provider_actor import WEIGHTS, ProviderActor, Script, answer_well, peer_of, seed_of, signer_of

from pinaivu_gateway.jobs import Job as BoughtJob
from pinaivu_gateway.jobs import JobFinished, JobOrder, Market
from pinaivu_gateway.market import MarketConfig, open_market
from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.memory import MemoryNetwork
from pinaivu_node.mesh.mesh import FrameStream, Mesh, MeshError
from pinaivu_node.protocol.ids import (
    ModelName,
    RequestId,
    UnixMilliseconds,
    digest_of,
    request_id_of,
)
from pinaivu_node.protocol.inference import (
    ChatTurn,
    Prompt,
    Sampling,
)
from pinaivu_node.protocol.market import (
    TO_COORDINATOR,
    AuctionPolicy,
    Award,
    Contact,
    Delivery,
    DispatchToken,
    Heartbeat,
    Hello,
    JobKind,
    JobRefused,
    JobRequest,
    ModelOffer,
    Outcome,
    RefusalReason,
    Role,
    Roster,
    RosterEntry,
    Welcome,
)
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.protocol.receipt import TO_LOG, BidSetReply, BidSetRequest, Receipt, ReceiptReply
from pinaivu_node.protocol.signing import Envelope, open_untrusted
from pinaivu_node.protocol.topics import LOG, MARKET
from pinaivu_node.protocol.wire import Message, decode_untrusted, encode

EPOCH = 1_800_000_000_000
AHEAD = 5_000
"""How far the coordinator's clock is ahead of the gateway's."""
MODEL = ModelName("smollm2:135m")
PRICES = PriceList(input=50_000_000, cached_input=10_000_000, output=200_000_000)
POLICY = AuctionPolicy(
    window_ms=400,
    grace_ms=20,
    enough_bids=3,
    bid_target=16,
    standbys=2,
    price_ceiling=PRICES,
    time_value_price=0,
    time_value_balanced=10,
    time_value_latency=100,
    prior_ttft_ms=500,
    prior_millitokens_per_second=20_000,
    prior_reliability_ppm=900_000,
    prior_weight=5,
    fee_ppm=20_000,
    token_ttl_ms=10_000,
)


def address_of(name: str) -> str:
    return f"/memory/{peer_of(name)}/p2p/{peer_of(name)}"


def clock() -> UnixMilliseconds:
    return UnixMilliseconds(EPOCH + round(1000 * trio.current_time()))


@dataclass
class Outbox:
    """Deliveries that outlive their gateway; `slow` and `broken` as disks can be."""

    kept: dict[RequestId, Envelope] = field(default_factory=dict)
    broken: bool = False

    async def put(self, request_id: RequestId, delivery: Envelope) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise OSError("no space left on device")
        self.kept[request_id] = delivery

    async def remove(self, request_id: RequestId) -> None:
        await trio.lowlevel.checkpoint()
        self.kept.pop(request_id, None)

    async def waiting(self) -> list[tuple[RequestId, Envelope]]:
        await trio.lowlevel.checkpoint()
        return list(self.kept.items())


# --- the coordinator ------------------------------------------------------------------------------

AwardHook = Callable[[DispatchToken], DispatchToken]


class CoordinatorActor:
    """Awards every job to the same providers, in order, and remembers what it is told."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.signer = signer_of("coordinator")
        self.winners: list[str] = []
        self.refusals: list[JobRefused] = []
        """Answers given before any award is made; the request id is filled in."""
        self.forge: AwardHook = lambda token: token
        self.sign_with = self.signer
        self.is_mute = False
        """Answers no request."""
        self.award_delay = 0.0
        self.beats = True
        self.requests: list[JobRequest] = []
        self.deliveries: dict[RequestId, Delivery] = {}
        self.delivered_times: dict[RequestId, int] = defaultdict(int)
        self.acknowledges = True
        self.stream: FrameStream | None = None
        self.hellos: list[Hello] = []
        self.log: dict[RequestId, ReceiptReply] = {}
        mesh.handle(MARKET, self._serve)
        mesh.handle(LOG, self._serve_log)

    async def _serve(self, stream: FrameStream) -> None:
        self.hellos.append(decode_untrusted(await stream.receive(), Hello))
        self.stream = stream
        welcome = Welcome(
            heartbeat_ms=1000,
            now=UnixMilliseconds(clock() + AHEAD),
            policy=POLICY,
            policy_hash=digest_of(b"policy"),
            balance=12345,
        )
        await stream.send(encode(welcome))
        await stream.send(encode(self.roster()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat, stream)
            try:
                while True:
                    message = decode_untrusted(await stream.receive(), *TO_COORDINATOR)
                    await self._take(message, stream, nursery)
            except MeshError:
                nursery.cancel_scope.cancel()

    def roster(self) -> Roster:
        entries = tuple(
            RosterEntry(
                peer=peer_of(name),
                role=Role.PROVIDER,
                addresses=(address_of(name),),
                models=(
                    ModelOffer(
                        model=MODEL,
                        digest=WEIGHTS,
                        context_window=8192,
                        capacity=4,
                        prices=PRICES,
                        kinds=(JobKind.CHAT,),
                        licence="apache-2.0",
                        owner="someone",
                    ),
                ),
            )
            for name in self.winners
        )
        return Roster(entries=entries)

    async def _beat(self, stream: FrameStream) -> None:
        sequence = 0
        with contextlib.suppress(MeshError):
            while True:
                if self.beats:
                    await stream.send(encode(Heartbeat(sequence=sequence)))
                sequence += 1
                await trio.sleep(1)

    async def _take(self, message: Message, stream: FrameStream, nursery: trio.Nursery) -> None:
        if isinstance(message, JobRequest):
            self.requests.append(message)
            if not self.is_mute:
                nursery.start_soon(self._answer, message, stream)
        elif isinstance(message, Envelope):
            delivery = open_untrusted(message, Delivery, signer=peer_of("gateway"))
            self.deliveries[delivery.request_id] = delivery
            self.delivered_times[delivery.request_id] += 1
            if self.acknowledges:
                await self.settle(delivery.request_id, message)

    async def _answer(self, request: JobRequest, stream: FrameStream) -> None:
        await trio.sleep(self.award_delay)
        request_id = request.terms.request_id
        answer: Message
        if self.refusals:
            refusal = self.refusals.pop(0)
            answer = refusal.model_copy(update={"request_id": request_id})
        else:
            answer = self.award(request)
        with contextlib.suppress(MeshError):
            await stream.send(encode(answer))

    def award(self, request: JobRequest) -> Award:
        terms, now = request.terms, UnixMilliseconds(clock() + AHEAD)
        tokens = []
        for rank, name in enumerate(self.winners[:3]):
            token = DispatchToken(
                request_id=terms.request_id,
                provider=peer_of(name),
                gateway=peer_of("gateway"),
                kind_of_job=terms.kind,
                model=terms.model,
                model_digest=WEIGHTS,
                rank=rank,
                input_limit=terms.input_limit,
                output_limit=terms.output_limit,
                prices=PRICES,
                uplift_ppm=0,
                sampling_digest=terms.sampling_digest,
                input_commitment=terms.input_commitment,
                bid_set_root=digest_of(b"bids"),
                policy_hash=digest_of(b"policy"),
                issued_at=now,
                expires_at=UnixMilliseconds(now + 10_000),
                deadline=terms.deadline,
            )
            tokens.append(self.sign_with.seal(self.forge(token)))
        return Award(
            request_id=terms.request_id,
            tokens=tuple(tokens),
            contacts=tuple(
                Contact(peer=peer_of(name), addresses=(address_of(name),))
                for name in self.winners[:3]
            ),
            bids=len(tokens),
            passes=0,
            auction_ms=7,
        )

    async def settle(self, request_id: RequestId, delivery: Envelope) -> None:
        receipt = self.signer.seal(self.receipt(request_id))
        self.log[request_id] = ReceiptReply(
            request_id=request_id, receipt=receipt, delivery=delivery
        )
        assert self.stream is not None
        await self.stream.send(encode(receipt))

    def receipt(self, request_id: RequestId) -> Receipt:
        nothing = digest_of(b"")
        return Receipt(
            request_id=request_id,
            coordinator=self.signer.peer_id,
            gateway=peer_of("gateway"),
            provider=peer_of(self.winners[0] if self.winners else "nobody"),
            kind_of_job=JobKind.CHAT,
            model=MODEL,
            model_digest=WEIGHTS,
            sampling_digest=nothing,
            input_commitment=nothing,
            output_hash=nothing,
            bid_set_root=nothing,
            bids=1,
            passes=0,
            policy_hash=nothing,
            segments=(),
            amount=0,
            fee=0,
            outcome=Outcome.COMPLETED,
            opened_at=UnixMilliseconds(1),
            awarded_at=UnixMilliseconds(2),
            settled_at=UnixMilliseconds(3),
            ledger_entry=1,
            delivery=None,
            attestation=None,
        )

    async def _serve_log(self, stream: FrameStream) -> None:
        with contextlib.suppress(MeshError):
            while True:
                question = decode_untrusted(await stream.receive(), *TO_LOG)
                request_id = question.request_id
                reply: Message
                if isinstance(question, BidSetRequest):
                    reply = BidSetReply(request_id=request_id, leaves=(b"leaf",))
                else:
                    reply = self.log.get(
                        request_id, ReceiptReply(request_id=request_id, receipt=None)
                    )
                await stream.send(encode(reply))


def refused(reason: RefusalReason, *, retry_after_ms: int | None = None) -> JobRefused:
    return JobRefused(
        request_id=request_id_of(bytes(16)),
        reason=reason,
        explanation=f"because of {reason.value}",
        retry_after_ms=retry_after_ms,
    )


# --- the place ------------------------------------------------------------------------------------


class Place:
    """One network with one gateway, opened by the test when its actors stand ready."""

    def __init__(self, network: MemoryNetwork, nursery: trio.Nursery) -> None:
        self.network = network
        self._nursery = nursery
        self._requests = 0
        self.outbox = Outbox()
        self.coordinator: CoordinatorActor
        self.gateway_mesh: Mesh

    async def start_coordinator(self) -> CoordinatorActor:
        mesh = await self._nursery.start(self._join, "coordinator")
        self.coordinator = CoordinatorActor(mesh)
        return self.coordinator

    async def provider(self, name: str, script: Script = answer_well) -> ProviderActor:
        mesh = await self._nursery.start(self._join, name)
        self.coordinator.winners.append(name)
        return ProviderActor(mesh, name, script)

    async def market(self, **config: Any) -> Market:
        """The gateway's market, with a stream to every provider that is there."""
        market: Market = await self._nursery.start(self._open, MarketConfig(**config))
        await until(
            lambda: (
                market.statistics().coordinator_connected
                and all(each.connected for each in market.providers())
            )
        )
        return market

    def order(self, *, max_tokens: int = 20, **changes: Any) -> JobOrder:
        self._requests += 1
        prompt = Prompt(nonce=bytes(16), turns=(ChatTurn(role="user", content="the sea?"),))
        fields: dict[str, Any] = {
            "request_id": request_id_of(self._requests.to_bytes(16)),
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

    async def delivery(self, order: JobOrder) -> Delivery:
        """What the coordinator was told in the end."""
        await until(lambda: order.request_id in self.coordinator.deliveries)
        return self.coordinator.deliveries[order.request_id]

    def kill(self, name: str) -> None:
        self.network.crash(peer_of(name))

    async def _join(self, name: str, *, task_status: Any) -> None:
        async with self.network.join(seed_of(name), MeshConfig(hub=True)) as mesh:
            task_status.started(mesh)
            await trio.sleep_forever()

    async def _open(self, config: MarketConfig, *, task_status: Any) -> None:
        async with (
            self.network.join(seed_of("gateway"), MeshConfig(hub=True)) as mesh,
            open_market(
                mesh,
                signer_of("gateway"),
                address_of("coordinator"),
                self.outbox,
                config,
                clock=clock,
            ) as market,
        ):
            self.gateway_mesh = mesh
            task_status.started(market)
            await trio.sleep_forever()


async def until(condition: Callable[[], bool], *, within: float = 30.0) -> None:
    """Wait, in virtual time, for what the actors will bring about."""
    with trio.fail_after(within):
        while not condition():  # noqa: ASYNC110 - nobody there could set an event
            await trio.sleep(0.01)


@contextlib.asynccontextmanager
async def open_place() -> AsyncIterator[Place]:
    """A network with a coordinator in it."""
    async with (
        MemoryNetwork(seed=5, latency=0.005) as network,
        trio.open_nursery() as nursery,
    ):
        place = Place(network, nursery)
        await place.start_coordinator()
        yield place
        nursery.cancel_scope.cancel()


async def spoken(job: BoughtJob) -> tuple[str, JobFinished]:
    text = ""
    async for event in job.events():
        if isinstance(event, JobFinished):
            return text, event
        text += event.text
    raise AssertionError("the events of a job end with JobFinished")


async def buy(place: Place, market: Market, **changes) -> tuple[str, JobFinished]:
    async with market.buy(place.order(**changes)) as job:
        return await spoken(job)
