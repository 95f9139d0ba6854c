"""The gateway's session with its coordinator: presence, rosters, auctions, deliveries.

One stream at a time, opened again whenever it is lost.  One task reads, one shows that we are
here, one sends deliveries; whoever wants an auction sends its own request and waits.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from typing import Final, assert_never

import trio

from pinaivu_gateway.deliveries import Deliveries
from pinaivu_gateway.jobs import CoordinatorUnreachable
from pinaivu_node.mesh.mesh import FrameStream, Mesh, MeshError, StreamLost
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId, RequestId, UnixMilliseconds
from pinaivu_node.protocol.market import (
    TO_PEER,
    Acknowledge,
    Award,
    Heartbeat,
    Hello,
    JobRefused,
    JobRequest,
    Role,
    Roster,
    RosterEntry,
    Welcome,
)
from pinaivu_node.protocol.receipt import Receipt
from pinaivu_node.protocol.signing import Envelope, open_untrusted
from pinaivu_node.protocol.wire import decode_untrusted, encode

logger = logging.getLogger(__name__)

Answer = Award | JobRefused
_Message = Welcome | Heartbeat | Roster | Award | JobRefused | Acknowledge | Envelope
_MESSAGES: Final[tuple[type[_Message], ...]] = TO_PEER
_SOFTWARE: Final = f"pinaivu/{version('pinaivu')}"[:64]
_WELCOME_SECONDS: Final = 10.0
"""A coordinator that is up answers in one round trip; a busy one in a second."""
_MISSED_HEARTBEATS: Final = 3
_MAX_ADDRESSES: Final = 8
_RESEND_SECONDS: Final = 15.0
"""Deliveries without a receipt are sent again: the coordinator waits ten seconds for a proof, and
can lose one only if its database fails."""
_MAX_ABANDONED: Final = 4096
"""Auctions that nobody waits for any more, whose awards must be handed back."""


class CoordinatorLink:
    """The session, over as many streams as it takes."""

    def __init__(
        self,
        mesh: Mesh,
        deliveries: Deliveries,
        *,
        clock: Callable[[], UnixMilliseconds],
        on_roster: Callable[[Roster], None],
        hand_back: Callable[[RequestId], None],
    ) -> None:
        """`hand_back` is called for a job that was, or may have been, awarded to nobody."""
        self.balance: int | None = None
        self.auction_window = 0.4
        """Seconds from an offer to its latest close."""
        self._incarnation = secrets.token_bytes(16)
        self._mesh = mesh
        self._deliveries = deliveries
        self._clock = clock
        self._clock_offset = 0
        self._on_roster = on_roster
        self._hand_back = hand_back
        self._stream: FrameStream | None = None
        self._providers: tuple[RosterEntry, ...] = ()
        self._asked: dict[RequestId, _Question] = {}
        self._abandoned: OrderedDict[RequestId, bool] = OrderedDict()
        """Whether it was handed back unseen; an award that comes all the same is again."""
        self._receipts: dict[RequestId, trio.Event] = {}

    @property
    def is_connected(self) -> bool:
        """Whether the coordinator has welcomed us and is there."""
        return self._stream is not None

    @property
    def providers(self) -> tuple[RosterEntry, ...]:
        """Who is in the market now; nobody while we do not know."""
        return self._providers if self._stream is not None else ()

    def now(self) -> UnixMilliseconds:
        """The time on the coordinator's clock, by which deadlines are read."""
        return UnixMilliseconds(self._clock() + self._clock_offset)

    async def ask(self, request: JobRequest, *, timeout: float) -> Answer:
        """The coordinator's answer to a request.  Raises CoordinatorUnreachable.

        When the wait is cut short, an award that comes all the same is handed back.
        """
        stream, request_id = self._stream, request.terms.request_id
        if stream is None:
            raise CoordinatorUnreachable("there is no connection to the coordinator")
        question = self._asked[request_id] = _Question()
        try:
            with trio.move_on_after(timeout):
                await stream.send(encode(request))
                await question.answered.wait()
        except MeshError as exc:
            raise CoordinatorUnreachable(f"the coordinator was lost: {exc}") from exc
        except BaseException:
            # The client left.  Its answer may be here already, with nobody to take it.
            if isinstance(question.answer, Award):
                self._hand_back(request_id)
            raise
        finally:
            del self._asked[request_id]
            if question.answer is None:
                self._abandon(request_id, is_lost=question.is_lost)
        if question.answer is None:
            what = "was lost during the auction" if question.is_lost else "does not answer"
            raise CoordinatorUnreachable(f"the coordinator {what}")
        return question.answer

    async def wait_receipt(self, request_id: RequestId) -> None:
        """Return when the coordinator tells of this receipt; it may have done so before."""
        event = self._receipts.setdefault(request_id, trio.Event())
        try:
            await event.wait()
        finally:
            if self._receipts.get(request_id) is event:
                del self._receipts[request_id]

    async def serve(self, stream: FrameStream) -> None:
        """Serve one stream until it ends, which raises what it ended with."""
        welcome = await self._introduce(stream)
        self._clock_offset = welcome.now - self._clock()
        self.balance = welcome.balance
        self.auction_window = welcome.policy.window_ms / 1000
        self._stream = stream
        self._deliveries.start_over()
        logger.info("welcomed by the coordinator %s", stream.peer)
        heartbeat = max(welcome.heartbeat_ms, 50) / 1000
        failure: MeshError | RemoteProtocolError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_lost, partial(self._beat, stream, heartbeat))
                nursery.start_soon(_until_lost, partial(self._send_deliveries, stream))
                nursery.start_soon(self._resend)
                # Kept, and raised outside: the caller tells errors by their type, and a nursery
                # would wrap them.
                try:
                    await self._read(stream, silence=_MISSED_HEARTBEATS * heartbeat)
                except (MeshError, RemoteProtocolError) as exc:
                    failure = exc
                nursery.cancel_scope.cancel()
        finally:
            self._stream = None
            self._providers = ()
            for question in self._asked.values():
                question.lose()
            self._hand_back_abandoned()
        if failure is not None:
            logger.warning("lost the coordinator: %s", failure)
            raise failure

    # --- what we say ------------------------------------------------------------------------------

    async def _introduce(self, stream: FrameStream) -> Welcome:
        hello = Hello(
            role=Role.GATEWAY,
            addresses=self._mesh.addresses[:_MAX_ADDRESSES],
            software=_SOFTWARE,
            incarnation=self._incarnation,
        )
        await stream.send(encode(hello))
        with trio.move_on_after(_WELCOME_SECONDS):
            return decode_untrusted(await stream.receive(), Welcome)
        raise StreamLost(f"no welcome within {_WELCOME_SECONDS:g} s")

    async def _beat(self, stream: FrameStream, heartbeat: float) -> None:
        sequence = 0
        while True:
            await stream.send(encode(Heartbeat(sequence=sequence)))
            sequence += 1
            await trio.sleep(heartbeat)

    async def _send_deliveries(self, stream: FrameStream) -> None:
        while True:
            await stream.send(encode(await self._deliveries.next_to_send()))

    async def _resend(self) -> None:
        while True:
            await trio.sleep(_RESEND_SECONDS)
            self._deliveries.start_over()

    # --- what the coordinator says ----------------------------------------------------------------

    async def _read(self, stream: FrameStream, *, silence: float) -> None:
        while True:
            frame = None
            with trio.move_on_after(silence):
                frame = await stream.receive()
            if frame is None:
                raise StreamLost(f"the coordinator was silent for {silence:g} s")
            self._take_untrusted(decode_untrusted(frame, *_MESSAGES), stream.peer)

    def _take_untrusted(self, message: _Message, coordinator: PeerId) -> None:
        match message:
            case Heartbeat():
                pass  # its arrival is what counts
            case Award() | JobRefused():
                self._take_answer(message)
            case Roster():
                self._providers = tuple(
                    entry for entry in message.entries if entry.role is Role.PROVIDER
                )
                self._on_roster(message)
            case Acknowledge(request_id=request_id, explanation=explanation):
                self._deliveries.settle(request_id)
                logger.debug("no receipt will come for %s: %s", request_id, explanation)
            case Envelope():
                receipt = open_untrusted(message, Receipt, signer=coordinator)
                self._deliveries.settle(receipt.request_id)
                if (event := self._receipts.get(receipt.request_id)) is not None:
                    event.set()
            case Welcome():
                raise RemoteProtocolError("a second Welcome")
            case _:
                assert_never(message)

    def _take_answer(self, answer: Answer) -> None:
        question = self._asked.get(answer.request_id)
        if question is not None and question.answer is None:
            question.give(answer)
        elif answer.request_id in self._abandoned:
            del self._abandoned[answer.request_id]
            if isinstance(answer, Award):
                self._hand_back(answer.request_id)

    def _abandon(self, request_id: RequestId, *, is_lost: bool) -> None:
        """Nobody waits any more, but an award may come, or may have been lost on its way."""
        self._abandoned[request_id] = is_lost
        if len(self._abandoned) > _MAX_ABANDONED:
            self._abandoned.popitem(last=False)
        if is_lost:
            self._hand_back(request_id)

    def _hand_back_abandoned(self) -> None:
        """The stream is lost, and with it perhaps awards that nobody was waiting for."""
        for request_id, is_handed_back in self._abandoned.items():
            if not is_handed_back:
                self._abandoned[request_id] = True
                self._hand_back(request_id)


class _Question:
    """A request that waits for its answer."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.is_lost = False
        self.answered = trio.Event()

    def give(self, answer: Answer) -> None:
        self.answer = answer
        self.answered.set()

    def lose(self) -> None:
        """The stream is gone, and with it the answer."""
        if self.answer is None:
            self.is_lost = True
            self.answered.set()


async def _until_lost(send: Callable[[], Awaitable[None]]) -> None:
    """Send until the stream is lost; its reader hears the reason and acts on it."""
    try:
        await send()
    except MeshError as exc:
        logger.debug("the coordinator's stream: %s", exc)
