"""The provider's side of the market: presence, offers and bids, proofs and receipts."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import trio

from pinaivu_node.mesh.mesh import Delivery, FrameStream, Mesh, MeshError, StreamLost
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import ModelName, PeerId
from pinaivu_node.protocol.market import (
    Acknowledge,
    Announce,
    Heartbeat,
    Hello,
    JobOffer,
    Role,
    Roster,
    Welcome,
)
from pinaivu_node.protocol.receipt import Receipt
from pinaivu_node.protocol.signing import Envelope, Signer, open_untrusted
from pinaivu_node.protocol.topics import jobs_topic
from pinaivu_node.protocol.wire import Message, decode_untrusted, encode
from pinaivu_node.provider.shop import Shop

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # its stubs of trio, which libp2p installs, know no other

logger = logging.getLogger(__name__)

_SOFTWARE: Final = f"pinaivu/{version('pinaivu')}"[:64]
_WELCOME_S: Final = 10.0
"""A coordinator that is up answers in one round trip; a busy one in a second."""
_MISSED_HEARTBEATS: Final = 3
_MAX_ADDRESSES: Final = 8
_FROM_COORDINATOR: Final = (Heartbeat, Roster, Acknowledge, Envelope)


class MarketSession:
    """The session with one coordinator, over as many streams as it takes."""

    def __init__(self, mesh: Mesh, signer: Signer, shop: Shop) -> None:
        self._mesh = mesh
        self._signer = signer
        self._shop = shop
        self._stream: FrameStream | None = None
        """Where bids go; None while the coordinator has not welcomed us."""
        self._kept: frozenset[PeerId] = frozenset()

    async def serve(self, stream: FrameStream) -> None:
        """Serve one stream to the coordinator until it ends, which raises what it ended with."""
        welcome = await self._introduce(stream)
        self._shop.welcomed(welcome)
        logger.info("welcomed by the coordinator %s", stream.peer)
        self._stream = stream
        heartbeat = welcome.heartbeat_ms / 1000
        failure: MeshError | RemoteProtocolError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_lost, partial(self._show_presence, stream, heartbeat))
                nursery.start_soon(_until_lost, partial(self._send_proofs, stream))
                # Kept, and raised outside: the caller tells errors by their type, and a nursery
                # would wrap them.
                try:
                    await self._read(stream, silence=_MISSED_HEARTBEATS * heartbeat)
                except (MeshError, RemoteProtocolError) as exc:
                    failure = exc
                nursery.cancel_scope.cancel()
        finally:
            self._stream = None
            self._shop.connected = False
        if failure is not None:
            logger.info("lost the coordinator: %s", failure)
            raise failure

    async def follow_offers(self, model: ModelName, *, task_status: TaskStatus[None]) -> None:
        """Answer the offers of one model until cancelled; ready when none would be missed."""
        async with self._mesh.subscribe(jobs_topic(model)) as deliveries:
            task_status.started()
            async for delivery in deliveries:
                await self._answer_untrusted(delivery)

    # --- presence ---------------------------------------------------------------------------------

    async def _introduce(self, stream: FrameStream) -> Welcome:
        hello = Hello(
            role=Role.PROVIDER,
            addresses=self._mesh.addresses[:_MAX_ADDRESSES],
            software=_SOFTWARE,
        )
        await stream.send(encode(hello))
        try:
            with trio.fail_after(_WELCOME_S):
                return decode_untrusted(await stream.receive(), Welcome)
        except trio.TooSlowError:
            raise StreamLost(f"no welcome within {_WELCOME_S:g} s") from None

    async def _show_presence(self, stream: FrameStream, heartbeat: float) -> None:
        announced: Announce | None = None
        sequence = 0
        while True:
            # Engines come and go; what changed is said with the next heartbeat, or at once if
            # somebody said that there are news.
            announcement = self._shop.announcement()
            if announcement != announced:
                await stream.send(encode(announcement))
                announced = announcement
            await stream.send(encode(Heartbeat(sequence=sequence, loads=self._shop.loads())))
            sequence += 1
            await self._shop.hear_news(heartbeat)

    async def _send_proofs(self, stream: FrameStream) -> None:
        while True:
            await stream.send(encode(await self._shop.proofs.next_to_send()))

    # --- what the coordinator says ----------------------------------------------------------------

    async def _read(self, stream: FrameStream, *, silence: float) -> None:
        while True:
            try:
                with trio.fail_after(silence):
                    frame = await stream.receive()
            except trio.TooSlowError:
                raise StreamLost(f"the coordinator was silent for {silence:g} s") from None
            self._take_untrusted(decode_untrusted(frame, *_FROM_COORDINATOR))

    def _take_untrusted(self, message: Message) -> None:
        match message:
            case Heartbeat():
                pass  # its arrival is what counts
            case Roster():
                self._keep_gateways(message)
            case Acknowledge(request_id=request_id, explanation=explanation):
                self._shop.proofs.settle(request_id)
                logger.warning("no receipt will come for %s: %s", request_id, explanation)
            case Envelope():
                self._shop.receipted(
                    open_untrusted(message, Receipt, signer=self._shop.coordinator)
                )
            case _:
                raise RemoteProtocolError(f"a coordinator says no {message.kind} to a provider")

    def _keep_gateways(self, roster: Roster) -> None:
        """Dial the gateways, so that they reach us however we are hidden; forget those that left.

        A provider that can be dialled does so too: whoever is first, one connection is enough.
        """
        gateways = [
            entry
            for entry in roster.entries
            if entry.role is Role.GATEWAY and entry.addresses and entry.peer != self._shop.me
        ][: self._shop.config.max_kept_gateways]
        kept = frozenset(entry.peer for entry in gateways)
        for peer in self._kept - kept:
            self._mesh.forget(peer)
        for entry in gateways:
            for address in entry.addresses:
                self._keep(entry.peer, address)
        self._kept = kept

    def _keep(self, peer: PeerId, address: str) -> None:
        if not address.endswith(f"/p2p/{peer}"):
            return  # it would connect us to somebody else
        try:
            self._mesh.keep(address)
        except MeshError as exc:
            logger.debug("an address of the gateway %s is of no use: %s", peer, exc)

    # --- offers -----------------------------------------------------------------------------------

    async def _answer_untrusted(self, delivery: Delivery) -> None:
        shop, stream = self._shop, self._stream
        if delivery.publisher != shop.coordinator:
            shop.tally.rejected_messages += 1
            return
        try:
            envelope = decode_untrusted(delivery.payload, Envelope)
            offer = open_untrusted(envelope, JobOffer, signer=shop.coordinator)
        except RemoteProtocolError as exc:
            shop.tally.rejected_messages += 1
            logger.debug("an offer that is none: %s", exc)
            return
        if stream is None:
            return  # nobody to tell
        answer = shop.answer(offer)
        if answer is not None:
            try:
                await stream.send(encode(self._signer.seal(answer)))
            except MeshError as exc:
                logger.debug("a bid came too late for its stream: %s", exc)


async def _until_lost(send: Callable[[], Awaitable[None]]) -> None:
    """Send until the stream is lost; its reader hears the reason and acts on it."""
    try:
        await send()
    except MeshError as exc:
        logger.debug("the coordinator's stream: %s", exc)
