"""A provider's world: its coordinator and gateways as hand-written actors on the memory mesh."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from pinaivu_node.engine.synthetic import SyntheticEngine
from pinaivu_node.mesh.memory import MemoryNetwork
from pinaivu_node.mesh.mesh import MeshError
from pinaivu_node.protocol.draw import EVERYONE
from pinaivu_node.protocol.ids import (
    Digest,
    ModelName,
    RequestId,
    UnixMilliseconds,
    digest_of,
    request_id_of,
)
from pinaivu_node.protocol.inference import (
    TO_GATEWAY,
    Accept,
    Cancel,
    ChatTurn,
    Dispatch,
    Done,
    Prompt,
    Refuse,
    Sampling,
    Tokens,
)
from pinaivu_node.protocol.market import (
    TO_COORDINATOR,
    Announce,
    AuctionPolicy,
    Bid,
    DispatchToken,
    Heartbeat,
    Hello,
    JobKind,
    JobOffer,
    JobTerms,
    ModelOffer,
    Outcome,
    Pass,
    Preference,
    Proof,
    Voucher,
    Welcome,
)
from pinaivu_node.protocol.money import PriceList, cost
from pinaivu_node.protocol.receipt import Receipt, ReceiptSegment
from pinaivu_node.protocol.signing import Envelope, Signer, open_untrusted
from pinaivu_node.protocol.topics import INFERENCE, MARKET, jobs_topic
from pinaivu_node.protocol.wire import decode_untrusted, encode
from pinaivu_node.provider.config import ProviderConfig
from pinaivu_node.provider.service import serve_provider
from pinaivu_node.provider.shelf import ServedModel, Stock

EPOCH = 1_800_000_000_000
MODEL = ModelName("smollm2:135m")
WEIGHTS = digest_of(b"weights")
PRICES = PriceList(input=50_000_000, cached_input=10_000_000, output=200_000_000)
DEAR = PriceList(input=10**12, cached_input=10**12, output=10**12)


def seed_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


class Facts:
    """Messages as an honest market would make them; every field can be told otherwise."""

    model = MODEL
    weights = WEIGHTS
    prices = PRICES
    epoch = UnixMilliseconds(EPOCH)

    def __init__(self) -> None:
        self.coordinator = Signer(seed_of("coordinator"))
        self.provider = Signer(seed_of("provider"))
        self.gateway = Signer(seed_of("gateway"))
        self.stranger = Signer(seed_of("stranger"))
        self._requests = 0

    def request_id(self) -> RequestId:
        self._requests += 1
        return request_id_of(self._requests.to_bytes(16))

    def policy(self) -> AuctionPolicy:
        return AuctionPolicy(
            window_ms=400,
            grace_ms=20,
            enough_bids=3,
            bid_target=16,
            standbys=2,
            price_ceiling=DEAR,
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

    def model_offer(self, **changes) -> ModelOffer:
        fields = {
            "model": MODEL,
            "digest": WEIGHTS,
            "context_window": 8192,
            "capacity": 4,
            "prices": PRICES,
            "kinds": (JobKind.CHAT, JobKind.COMPLETION),
            "licence": "Apache-2.0",
            "owner": "someone",
        }
        return ModelOffer(**(fields | changes))

    def stock(self, *, ready=True, running=0, **changes) -> dict[ModelName, Stock]:
        offer = self.model_offer(**changes)
        return {offer.model: Stock(offer=offer, ready=ready, running=running)}

    def prompt(self, text="Hello there!") -> Prompt:
        return Prompt(nonce=bytes(16), turns=(ChatTurn(role="user", content=text),))

    def terms(self, **changes) -> JobTerms:
        fields = {
            "request_id": changes.get("request_id") or self.request_id(),
            "kind": JobKind.CHAT,
            "model": MODEL,
            "model_digest": None,
            "input_estimate": 20,
            "input_limit": 200,
            "output_estimate": 50,
            "output_limit": 4000,
            "max_prices": None,
            "preference": Preference.BALANCED,
            "sampling_digest": Sampling(max_tokens=32).digest,
            "input_commitment": self.prompt().commitment,
            "deadline": UnixMilliseconds(EPOCH + 600_000),
        }
        return JobTerms(**(fields | changes))

    def offer(self, *, threshold=EVERYONE, closes_at=EPOCH + 400, **changes) -> JobOffer:
        return JobOffer(
            terms=self.terms(**changes),
            gateway=self.gateway.peer_id,
            fingerprints=(),
            threshold=threshold,
            closes_at=UnixMilliseconds(closes_at),
        )

    def token(self, dispatch_of=None, *, now=EPOCH, **changes) -> DispatchToken:
        prompt, sampling = dispatch_of or (self.prompt(), Sampling(max_tokens=32))
        fields = {
            "request_id": changes.get("request_id") or self.request_id(),
            "provider": self.provider.peer_id,
            "gateway": self.gateway.peer_id,
            "kind_of_job": JobKind.CHAT,
            "model": MODEL,
            "model_digest": WEIGHTS,
            "rank": 0,
            "input_limit": 200,
            "output_limit": 4000,
            "prices": PRICES,
            "uplift_ppm": 0,
            "sampling_digest": sampling.digest,
            "input_commitment": prompt.commitment,
            "bid_set_root": digest_of(b"bids"),
            "policy_hash": digest_of(b"policy"),
            "issued_at": now,
            "expires_at": now + 10_000,
            "deadline": now + 600_000,
        }
        return DispatchToken(**(fields | changes))

    def dispatch(
        self, *, prompt=None, sampling=None, token=None, signer=None, resume=(), **changes
    ) -> Dispatch:
        prompt = prompt or self.prompt()
        sampling = sampling or Sampling(max_tokens=32)
        token = token or self.token((prompt, sampling), **changes)
        return Dispatch(
            request_id=token.request_id,
            token=(signer or self.coordinator).seal(token),
            prompt=prompt,
            sampling=sampling,
            resume_token_ids=resume,
        )

    def receipt(self, proof: Proof, **changes) -> Receipt:
        amount = cost(proof.usage, PRICES)
        segment = ReceiptSegment(
            provider=proof.provider,
            model_digest=proof.model_digest,
            usage=proof.usage,
            prices=PRICES,
            uplift_ppm=0,
            amount=amount,
            outcome=proof.outcome,
            output_hash=proof.output_hash,
            ttft_ms=10,
            duration_ms=proof.duration_ms,
            proof=None,
        )
        fields = {
            "request_id": proof.request_id,
            "coordinator": self.coordinator.peer_id,
            "gateway": proof.gateway,
            "provider": proof.provider,
            "kind_of_job": JobKind.CHAT,
            "model": MODEL,
            "model_digest": proof.model_digest,
            "sampling_digest": digest_of(b"sampling"),
            "input_commitment": digest_of(b"input"),
            "output_hash": proof.output_hash,
            "bid_set_root": digest_of(b"bids"),
            "bids": 1,
            "passes": 0,
            "policy_hash": digest_of(b"policy"),
            "segments": (segment,),
            "amount": amount,
            "fee": amount * 20_000 // 10**6,
            "outcome": Outcome.COMPLETED,
            "opened_at": EPOCH,
            "awarded_at": EPOCH,
            "settled_at": EPOCH,
            "ledger_entry": 1,
            "delivery": None,
            "attestation": None,
        }
        return Receipt(**(fields | changes))


class CoordinatorActor:
    """Says what a coordinator says, when a test tells it to, and writes down what it hears."""

    heartbeat_s = 1.0

    def __init__(self, mesh, facts, clock) -> None:
        self.mesh, self.facts, self.clock = mesh, facts, clock
        self.heard = []
        self.proofs = defaultdict(list)
        self.stream = None
        self.sessions = 0
        self._news = trio.Condition()
        mesh.handle(MARKET, self.serve)

    async def serve(self, stream) -> None:
        assert isinstance(decode_untrusted(await stream.receive(), *TO_COORDINATOR), Hello)
        self.sessions += 1
        welcome = Welcome(
            heartbeat_ms=round(1000 * self.heartbeat_s),
            now=self.clock(),
            policy=self.facts.policy(),
            policy_hash=digest_of(b"policy"),
            balance=0,
        )
        await stream.send(encode(welcome))
        self.stream = stream
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat, stream)
            try:
                while True:
                    await self._hear(await stream.receive())
            except MeshError:
                pass
            nursery.cancel_scope.cancel()

    async def _beat(self, stream) -> None:
        sequence = 0
        while True:
            try:
                await stream.send(encode(Heartbeat(sequence=sequence)))
            except MeshError:
                return
            sequence += 1
            await trio.sleep(self.heartbeat_s)

    async def _hear(self, frame) -> None:
        message = decode_untrusted(frame, *TO_COORDINATOR)
        if isinstance(message, Envelope):
            kinds = (Bid, Pass, Proof)
            opened = open_untrusted(message, *kinds, signer=self.facts.provider.peer_id)
            if isinstance(opened, Proof):
                self.proofs[opened.request_id].append(opened)
            message = opened
        async with self._news:
            self.heard.append(message)
            self._news.notify_all()

    async def wait_for(self, kind, **fields):
        """The first message heard of this kind with these fields, now or later."""

        def found():
            for message in self.heard:
                if isinstance(message, kind) and all(
                    getattr(message, name) == value for name, value in fields.items()
                ):
                    return message
            return None

        with trio.fail_after(60):
            async with self._news:
                while (message := found()) is None:
                    await self._news.wait()
                return message

    async def until(self, condition) -> None:
        with trio.fail_after(60):
            async with self._news:
                while not condition():
                    await self._news.wait()

    async def publish(self, offer, *, signer=None) -> None:
        envelope = (signer or self.facts.coordinator).seal(offer)
        await self.mesh.publish(jobs_topic(offer.terms.model), encode(envelope))

    async def offer(self, **changes) -> JobOffer:
        offer = self.facts.offer(closes_at=self.clock() + 400, **changes)
        await self.publish(offer)
        return offer

    async def say(self, message) -> None:
        await self.stream.send(encode(message))


class GatewayActor:
    """Dispatches what a test tells it to, vouches as gateways do, and keeps what came."""

    def __init__(self, stream, facts, clock, *, vouches=True) -> None:
        self.stream, self.facts, self.clock, self.vouches = stream, facts, clock, vouches
        self.accepted = set()
        self.refused = {}
        self.ids = defaultdict(list)
        self.text = defaultdict(str)
        self.done = {}
        self.frames_with_tokens = 0
        self._vouched = defaultdict(int)
        self._news = trio.Condition()
        self.failure = None
        self.scope = trio.CancelScope()
        """Cancelled, it reads no more."""

    async def read(self) -> None:
        with self.scope:
            await self._read()

    async def _read(self) -> None:
        try:
            while True:
                frame = await self.stream.receive()
                async with self._news:
                    await self._take(decode_untrusted(frame, *TO_GATEWAY))
                    self._news.notify_all()
        except MeshError as exc:
            async with self._news:
                self.failure = exc
                self._news.notify_all()

    async def _take(self, message) -> None:
        match message:
            case Accept(request_id=request_id):
                assert request_id not in self.accepted
                self.accepted.add(request_id)
            case Refuse(request_id=request_id):
                self.refused[request_id] = message
            case Tokens(deltas=deltas):
                self.frames_with_tokens += 1
                for delta in deltas:
                    assert delta.request_id in self.accepted
                    assert delta.request_id not in self.done
                    self.ids[delta.request_id] += delta.token_ids
                    self.text[delta.request_id] += delta.text
                    await self._vouch(delta.request_id)
            case Done(request_id=request_id):
                assert request_id in self.accepted
                self.done[request_id] = message

    async def _vouch(self, request_id) -> None:
        count = len(self.ids[request_id])
        if self.vouches and count - self._vouched[request_id] >= 128:
            self._vouched[request_id] = count
            await self.vouch(request_id, count)

    async def vouch(self, request_id, count, *, signer=None) -> None:
        voucher = Voucher(
            request_id=request_id, provider=self.facts.provider.peer_id, output_tokens=count
        )
        await self.stream.send(encode((signer or self.facts.gateway).seal(voucher)))

    async def dispatch(self, dispatch=None, **changes) -> RequestId:
        if dispatch is None:
            dispatch = self.facts.dispatch(now=self.clock(), **changes)
        await self.stream.send(encode(dispatch))
        return dispatch.request_id

    async def cancel(self, request_id) -> None:
        await self.stream.send(encode(Cancel(request_id=request_id)))

    async def until(self, condition) -> None:
        with trio.fail_after(120):
            async with self._news:
                while not condition():
                    await self._news.wait()

    async def wait_done(self, request_id) -> tuple[Done, Proof]:
        await self.until(lambda: request_id in self.done)
        done = self.done[request_id]
        return done, open_untrusted(done.proof, Proof, signer=self.facts.provider.peer_id)

    async def wait_refused(self, request_id) -> Refuse:
        await self.until(lambda: request_id in self.refused)
        return self.refused[request_id]

    async def wait_tokens(self, request_id, count) -> None:
        await self.until(lambda: len(self.ids[request_id]) >= count)


class World:
    """One network; the provider is started by the test, as often as it likes."""

    def __init__(self, network, facts, nursery) -> None:
        self.network, self.facts, self.nursery = network, facts, nursery
        self.engine = SyntheticEngine(tokens_per_second=100.0, ttft_ms=50.0, capacity=4)

    @staticmethod
    def clock() -> UnixMilliseconds:
        return UnixMilliseconds(EPOCH + round(1000 * trio.current_time()))

    @asynccontextmanager
    async def coordinate(self):
        async with self.network.join(seed_of("coordinator")) as mesh:
            yield CoordinatorActor(mesh, self.facts, self.clock)

    @asynccontextmanager
    async def provide(self, *, engine=None, on_demand=None, **settings):
        """A running provider; leaving the block stops it."""
        peer = self.facts.coordinator.peer_id
        served = ServedModel(
            engine=engine or self.engine,
            model=MODEL,
            digest=WEIGHTS,
            prices=PRICES,
            on_demand=on_demand,
        )
        async with (
            self.network.join(seed_of("provider")) as mesh,
            trio.open_nursery() as nursery,
        ):
            start = partial(
                serve_provider,
                mesh,
                self.facts.provider,
                peer,
                f"/memory/{peer}/p2p/{peer}",
                {MODEL: served},
                ProviderConfig(**({"proofs_folder": None} | settings)),
                clock=self.clock,
            )
            self.provider_scope = nursery.cancel_scope
            yield await nursery.start(start)
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def buy(self, *, name="gateway", vouches=True):
        """A gateway with a stream to the provider."""
        peer = self.facts.provider.peer_id
        async with self.network.join(seed_of(name)) as mesh, trio.open_nursery() as nursery:
            await mesh.dial(f"/memory/{peer}/p2p/{peer}")
            stream = await mesh.open(peer, INFERENCE)
            gateway = GatewayActor(stream, self.facts, self.clock, vouches=vouches)
            gateway.mesh = mesh
            nursery.start_soon(gateway.read)
            yield gateway
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def market(self, *, vouches=True, engine=None, **settings):
        """All three, introduced to each other."""
        async with (
            self.coordinate() as coordinator,
            self.provide(engine=engine, **settings) as provider,
        ):
            await coordinator.wait_for(Announce)
            async with self.buy(vouches=vouches) as gateway:
                yield coordinator, provider, gateway


@pytest.fixture
def facts() -> Facts:
    return Facts()


@pytest.fixture
async def world(facts, autojump_clock):
    async with MemoryNetwork(seed=7, latency=0.005) as network, trio.open_nursery() as nursery:
        yield World(network, facts, nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture
def text_hash():
    return lambda text: Digest("sha256:" + hashlib.sha256(text.encode()).hexdigest())
