"""The coordinator: its parts put together, and the market stream that feeds them.

One task per market stream reads and decides; one writes what waits in that stream's outbox; one
per auction and per receipt; one beats the heart and notices the silent; one settles what is
overdue; one tells rosters.  What waits for the disk holds up nobody's stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, assert_never

import trio

from pinaivu_node.coordinator import refusal
from pinaivu_node.coordinator.auction_house import AuctionHouse
from pinaivu_node.coordinator.clearing import Clearing
from pinaivu_node.coordinator.config import CoordinatorConfig
from pinaivu_node.coordinator.floor import open_floor
from pinaivu_node.coordinator.ledger import (
    Account,
    deposit_entry,
    gateway_account,
    provider_account,
    welcome_entry,
)
from pinaivu_node.coordinator.log import LogDesk
from pinaivu_node.coordinator.pace import Pace
from pinaivu_node.coordinator.sessions import Session
from pinaivu_node.coordinator.store import Store
from pinaivu_node.coordinator.tally import CoordinatorStatistics
from pinaivu_node.mesh.mesh import FrameStream, Mesh, StreamEnded
from pinaivu_node.protocol.errors import PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import (
    MAX_SAFE_INTEGER,
    Milliseconds,
    NanoX,
    PeerId,
    UnixMilliseconds,
)
from pinaivu_node.protocol.market import (
    TO_COORDINATOR,
    Announce,
    Bid,
    Delivery,
    Drain,
    Heartbeat,
    Hello,
    JobRequest,
    Pass,
    Proof,
    Role,
    Welcome,
)
from pinaivu_node.protocol.signing import Envelope, Signer, open_untrusted
from pinaivu_node.protocol.topics import LOG, MARKET
from pinaivu_node.protocol.wire import decode_untrusted, encode

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # its stubs of trio, which libp2p installs, know no other

logger = logging.getLogger(__name__)

_Message = Hello | Announce | Heartbeat | Drain | JobRequest | Envelope
_MESSAGES: Final[tuple[type[_Message], ...]] = TO_COORDINATOR
_STATEMENTS: Final[tuple[type[Bid | Pass | Proof | Delivery], ...]] = (Bid, Pass, Proof, Delivery)
_BY_ROLE: Final = {
    Role.PROVIDER: (Bid, Pass, Proof),
    Role.GATEWAY: (Delivery,),
}


async def serve_coordinator(
    mesh: Mesh,
    store: Store,
    signer: Signer,
    config: CoordinatorConfig,
    *,
    clock: Callable[[], UnixMilliseconds],
    task_status: TaskStatus[Coordinator] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the market until cancelled; reports the coordinator when it can be dialled.

    The caller owns `mesh` and `store` and closes them afterwards.  Raises StoreError if the books
    cannot be read at the start; later failures refuse or delay what needs the books.
    """
    async with trio.open_nursery() as nursery:
        coordinator = Coordinator(mesh, store, signer, config, clock=clock, nursery=nursery)
        await coordinator.recover()
        mesh.handle(MARKET, coordinator.serve_market)
        mesh.handle(LOG, coordinator.serve_log)
        nursery.start_soon(coordinator.beat)
        nursery.start_soon(coordinator.sweep)
        nursery.start_soon(coordinator.tell_rosters)
        task_status.started(coordinator)


class Coordinator:
    """A coordinator that is being served; made by `serve_coordinator`."""

    def __init__(
        self,
        mesh: Mesh,
        store: Store,
        signer: Signer,
        config: CoordinatorConfig,
        *,
        clock: Callable[[], UnixMilliseconds],
        nursery: trio.Nursery,
    ) -> None:
        self.peer_id: Final = signer.peer_id
        self._mesh = mesh
        self._nursery = nursery
        self._floor = open_floor(store, signer, config, clock=clock)
        self._clearing = Clearing(self._floor, nursery)
        self._house = AuctionHouse(mesh, self._floor, self._clearing)
        self._log = LogDesk(store, requests_per_second=config.log_requests_per_second)
        self._roster_changed = trio.Event()

    # --- what an operator may ask -------------------------------------------------------------

    async def accounts(self) -> dict[Account, int]:
        """Every account that is not empty, in NanoX; they sum to zero."""
        return await self._floor.store.accounts()

    async def deposit(self, peer: PeerId, amount: NanoX, key: str) -> bool:
        """Credit a gateway; False if a deposit of this key was made before."""
        return await self._floor.store.post(
            deposit_entry(peer, amount, key=key), now=self._floor.clock()
        )

    async def ban(self, peer: PeerId, duration: Milliseconds, reason: str) -> None:
        """Shut a peer out of the market and off the mesh for a while, restarts included."""
        until = UnixMilliseconds(self._floor.clock() + duration)
        await self._floor.store.ban(peer, until=until, reason=reason[:300])
        self._floor.banned[peer] = until
        self._mesh.ban(peer, duration=duration)
        self._floor.sessions.drop(peer, reason)

    def statistics(self) -> CoordinatorStatistics:
        """One look at what is here and what was done."""
        tally = self._floor.tally
        return CoordinatorStatistics(
            peers=self._floor.market.counts(),
            running_auctions=len(self._house),
            open_jobs=len(self._clearing),
            requests=tally.requests,
            awards=tally.awards,
            refusals=dict(tally.refusals),
            bids=tally.bids,
            passes=tally.passes,
            settlements=dict(tally.settlements),
            messages_received=tally.messages_received,
            messages_ignored=tally.messages_ignored,
            roster_left_out=self._floor.market.left_out,
            award_ms_total=tally.award_ms_total,
            award_ms_slowest=tally.award_ms_slowest,
            store=self._floor.store.statistics(),
        )

    # --- what runs ----------------------------------------------------------------------------

    async def recover(self) -> None:
        """Know again what an earlier life knew."""
        now = self._floor.clock()
        for subject, track in await self._floor.store.tracks():
            self._floor.reputation.learn(subject, track)
        for peer, until in (await self._floor.store.bans(now=now)).items():
            self._floor.banned[peer] = until
            self._mesh.ban(peer, duration=Milliseconds(until - now))
        await self._clearing.recover()

    async def beat(self) -> None:
        """Every heartbeat: say so, and give up the silent."""
        sequence = 0
        while True:
            await trio.sleep(self._floor.config.heartbeat_ms / 1000)
            sequence += 1
            frame = encode(Heartbeat(sequence=sequence))
            for session in self._floor.sessions:
                session.send(frame)
            interval = self._floor.config.heartbeat_ms
            for peer in self._floor.market.silent(now=_uptime(), heartbeat_ms=interval):
                self._floor.sessions.drop(peer, "it missed three heartbeats")
                self._leave(peer)

    async def sweep(self) -> None:
        """Every heartbeat: settle what has waited long enough."""
        while True:
            await trio.sleep(self._floor.config.heartbeat_ms / 1000)
            self._clearing.settle_due()

    async def tell_rosters(self) -> None:
        """Tell gateways of providers and providers of gateways whenever either changes."""
        while True:
            await self._roster_changed.wait()
            self._roster_changed = trio.Event()
            frames = {role: encode(self._floor.market.roster_for(role)) for role in Role}
            for session in self._floor.sessions:
                session.tell_roster(frames[session.role])
            # A large roster is told less often: about a megabyte a second to each peer.
            size = max(len(frame) for frame in frames.values())
            await trio.sleep(self._floor.config.roster_interval_ms / 1000 + size / 1_000_000)

    async def serve_log(self, stream: FrameStream) -> None:
        """Serve one log stream."""
        await self._log.serve(stream)

    async def serve_market(self, stream: FrameStream) -> None:
        """Serve one market stream, from its Hello to its end."""
        hello = await self._hello(stream)
        pace = Pace(self._floor.config.messages_per_second, now=trio.current_time())
        session = Session(stream, hello, pace)
        welcome = await self._welcome(session)
        self._enter(session, hello)
        session.say(welcome)
        try:
            await session.run(self._read)
        finally:
            if self._floor.sessions.leave(session):
                self._leave(stream.peer)

    async def _hello(self, stream: FrameStream) -> Hello:
        with trio.move_on_after(self._floor.config.hello_timeout_ms / 1000):
            return decode_untrusted(await stream.receive(), Hello)
        raise RemoteProtocolError("a market stream without a Hello")

    def _enter(self, session: Session, hello: Hello) -> None:
        self._floor.market.enter(session.peer, hello, now=_uptime())
        self._floor.sessions.enter(session)
        self._roster_changed.set()

    def _leave(self, peer: PeerId) -> None:
        self._house.forget(peer)
        if self._floor.market.leave(peer):
            self._roster_changed.set()

    async def _welcome(self, session: Session) -> Welcome:
        peer, now = session.peer, self._floor.clock()
        if session.role is Role.GATEWAY:
            credit = NanoX(self._floor.config.welcome_credit)
            if credit:
                await self._floor.store.post(welcome_entry(peer, credit), now=now)
            account = gateway_account(peer)
        else:
            account = provider_account(peer)
        balance = await self._floor.store.balance(account)
        return Welcome(
            heartbeat_ms=Milliseconds(self._floor.config.heartbeat_ms),
            now=now,
            policy=self._floor.config.policy,
            policy_hash=self._floor.policy_hash,
            balance=max(-MAX_SAFE_INTEGER, min(balance, MAX_SAFE_INTEGER)),
        )

    async def _read(self, session: Session) -> None:
        """Take in what a peer says until it ends its stream."""
        while True:
            try:
                frame = await session.receive()
            except StreamEnded:
                return
            self._floor.tally.messages_received += 1
            self._floor.market.hear(session.peer, _uptime())
            try:
                await self._take_untrusted(session, decode_untrusted(frame, *_MESSAGES))
            except RemoteProtocolError as exc:
                if exc.action is not PeerAction.IGNORE:
                    raise
                self._floor.tally.messages_ignored += 1
                logger.debug("ignored from %s: %s", session.peer, exc)

    async def _take_untrusted(
        self,
        session: Session,
        message: _Message,
    ) -> None:
        peer = session.peer
        match message:
            case Envelope():
                await self._take_statement_untrusted(session, message)
            case JobRequest():
                if session.role is not Role.GATEWAY:
                    raise RemoteProtocolError("only a gateway may ask for a job")
                self._nursery.start_soon(self._hold_auction, peer, message)
            case Heartbeat():
                self._floor.market.report_load(peer, message)
            case Announce():
                self._floor.market.announce_untrusted(peer, message)
                self._roster_changed.set()
            case Drain():
                self._floor.market.drain_untrusted(peer, draining=message.draining)
                self._roster_changed.set()
            case Hello():
                raise RemoteProtocolError("a second Hello on one stream")
            case _:
                assert_never(message)

    async def _take_statement_untrusted(self, session: Session, envelope: Envelope) -> None:
        statement = open_untrusted(envelope, *_STATEMENTS, signer=session.peer)
        if not isinstance(statement, _BY_ROLE[session.role]):
            raise RemoteProtocolError(f"a {session.role} sends a {statement.kind}")
        match statement:
            case Bid() | Pass():
                self._house.add_answer_untrusted(session.peer, statement, envelope)
            case Proof() | Delivery():
                await self._clearing.take_untrusted(session.peer, statement, envelope)
            case _:
                assert_never(statement)

    async def _hold_auction(self, gateway: PeerId, request: JobRequest) -> None:
        """The edge of one request: whatever goes wrong in it stays in it."""
        try:
            await self._house.hold(gateway, request)
        except Exception:
            logger.exception("the auction of %s failed", request.terms.request_id)
            self._floor.sessions.say(
                gateway, refusal.overloaded(request.terms, "the coordinator failed; see its log")
            )


def _uptime() -> Milliseconds:
    """A clock for liveness: nobody is given up because the wall clock was set."""
    return Milliseconds(round(1000 * trio.current_time()))
