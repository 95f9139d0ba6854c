"""A provider at work: sells what its engines can run, until it is cancelled."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import trio

from pinaivu_node.engine.types import Engine, EngineDead
from pinaivu_node.mesh.mesh import FrameStream, Mesh
from pinaivu_node.mesh.session import keep_session
from pinaivu_node.protocol.ids import ModelName, PeerId
from pinaivu_node.protocol.signing import Signer
from pinaivu_node.protocol.topics import INFERENCE, MARKET
from pinaivu_node.provider.config import ProviderConfig
from pinaivu_node.provider.gateway_stream import GatewayStream
from pinaivu_node.provider.market_session import MarketSession
from pinaivu_node.provider.shelf import ServedModel
from pinaivu_node.provider.shop import Clock, Shop
from pinaivu_node.provider.statistics import ProviderStatistics

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # its stubs of trio, which libp2p installs, know no other

logger = logging.getLogger(__name__)

_LEAVE_S: Final = 5.0
"""What leaving waits for jobs to stop and for their proofs to be on disk: both take milliseconds,
unless an engine hangs or the disk does."""


class Provider:
    """A running provider, as its daemon sees it."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop

    def drain(self) -> None:
        """Take no new jobs; those that run are finished.  Harmless when repeated."""
        self._shop.drain(draining=True)

    def resume(self) -> None:
        """Take jobs again."""
        self._shop.drain(draining=False)

    def statistics(self) -> ProviderStatistics:
        """A snapshot, at once."""
        return self._shop.statistics()


async def serve_provider(  # noqa: PLR0913 - the composition root hands each its own slice
    mesh: Mesh,
    signer: Signer,
    coordinator: PeerId,
    coordinator_address: str | None,
    engines: Mapping[ModelName, ServedModel],
    config: ProviderConfig,
    *,
    clock: Clock,
    task_status: TaskStatus[Provider],
) -> None:
    """Sell these models at this coordinator until cancelled.

    Ready, with a `Provider`, when offers and dispatches would be heard; the coordinator need not
    be there yet.  `coordinator_address` None means that somebody else keeps us connected to it;
    PeerUnreachable if it can never be dialled.  Mesh and engines stay the caller's.  Cancelled, it
    cancels what runs, signs what was done and writes those proofs to disk.
    """
    shop = Shop(signer, coordinator, engines, config, clock=clock)
    market = MarketSession(mesh, signer, shop)
    counter = _Counter(shop)
    await shop.proofs.load(shop.me)
    if coordinator_address is not None:
        mesh.keep(coordinator_address)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shop.proofs.keep)
            for served in engines.values():
                nursery.start_soon(_tell_when_ready, served.engine, shop)
                await nursery.start(market.follow_offers, served.model)
            mesh.handle(INFERENCE, counter.serve)
            nursery.start_soon(keep_session, mesh, coordinator, MARKET, market.serve)
            task_status.started(Provider(shop))
    finally:
        with trio.move_on_after(_LEAVE_S) as scope:
            scope.shield = True
            await counter.close()
            await shop.proofs.flush()


async def _tell_when_ready(engine: Engine, shop: Shop) -> None:
    try:
        await engine.wait_ready()
    except EngineDead as exc:
        # Its own supervisor goes on trying; a heartbeat will notice when it is up.
        logger.warning("an engine is not ready: %s", exc)
    shop.news.set()


class _Counter:
    """Where gateways are served, one stream each."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._streams: dict[PeerId, GatewayStream] = {}
        self._serving = 0
        self._left = trio.Event()
        self._is_open = True

    async def serve(self, stream: FrameStream) -> None:
        """Serve a gateway's stream.

        A second one of the same gateway takes the first one's place: it lost that one before we
        noticed.
        """
        if not self._is_open:
            return
        if (former := self._streams.pop(stream.peer, None)) is not None:
            former.close()
        if len(self._streams) >= self._shop.config.max_streams and not self._make_room():
            logger.warning("too many gateways are busy here to serve %s", stream.peer)
            return
        served = self._streams[stream.peer] = GatewayStream(stream, self._shop)
        self._shop.gateways = len(self._streams)
        self._serving += 1
        try:
            await served.serve()
        finally:
            self._serving -= 1
            self._left.set()
            if self._streams.get(stream.peer) is served:
                del self._streams[stream.peer]
            self._shop.gateways = len(self._streams)

    async def close(self) -> None:
        """Serve nobody any more, and wait until every job is over and its proof is signed."""
        self._is_open = False
        for served in self._streams.values():
            served.close()
        while self._serving:
            self._left = trio.Event()
            await self._left.wait()

    def _make_room(self) -> bool:
        """Close the oldest stream that has no job; False if all of them work."""
        idle = next((peer for peer, each in self._streams.items() if not each.jobs), None)
        if idle is None:
            return False
        self._streams.pop(idle).close()
        return True
