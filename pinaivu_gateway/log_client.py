"""Asks the coordinator's log what became of a request; one stream, one question at a time."""

from __future__ import annotations

from typing import Final, TypeVar

import trio

from pinaivu_gateway.jobs import CoordinatorUnreachable
from pinaivu_node.mesh.mesh import FrameStream, Mesh, MeshError
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId, RequestId
from pinaivu_node.protocol.receipt import (
    BidSetReply,
    BidSetRequest,
    Receipt,
    ReceiptReply,
    ReceiptRequest,
)
from pinaivu_node.protocol.signing import open_untrusted
from pinaivu_node.protocol.topics import LOG
from pinaivu_node.protocol.wire import decode_untrusted, encode

ANSWER_SECONDS: Final = 5.0
"""A look-up takes milliseconds; a coordinator that paces us makes us wait a second or two."""
MAX_WAITING: Final = 128
"""Questions at once; more are refused, since each waits for all before it."""

R = TypeVar("R", ReceiptReply, BidSetReply)


class LogClient:
    """The log of one coordinator."""

    def __init__(self, mesh: Mesh, coordinator: PeerId) -> None:
        self._mesh = mesh
        self._coordinator = coordinator
        self._stream: FrameStream | None = None
        self._lock = trio.Lock()

    async def receipt(self, request_id: RequestId) -> ReceiptReply:
        """What is known; a receipt in it is signed by the coordinator and for this request."""
        reply = await self._ask(ReceiptRequest(request_id=request_id), ReceiptReply)
        if reply.receipt is not None:
            try:
                receipt = open_untrusted(reply.receipt, Receipt, signer=self._coordinator)
            except RemoteProtocolError as exc:
                raise CoordinatorUnreachable(f"the coordinator's receipt is none: {exc}") from exc
            if receipt.request_id != request_id:
                raise CoordinatorUnreachable("the coordinator answered with another's receipt")
        return reply

    async def bid_set(self, request_id: RequestId) -> tuple[bytes, ...] | None:
        """The leaves, None if unknown."""
        return (await self._ask(BidSetRequest(request_id=request_id), BidSetReply)).leaves

    def close(self) -> None:
        """Let the stream go."""
        if self._stream is not None:
            self._stream.reset()
            self._stream = None

    async def _ask(self, question: ReceiptRequest | BidSetRequest, kind: type[R]) -> R:
        if self._lock.statistics().tasks_waiting >= MAX_WAITING:
            raise CoordinatorUnreachable("too many questions wait for the coordinator's log")
        async with self._lock:
            with trio.move_on_after(ANSWER_SECONDS):
                try:
                    return await self._ask_once(question, kind)
                except MeshError:
                    pass  # an old stream may have died unnoticed; a second one tells
                try:
                    return await self._ask_once(question, kind)
                except MeshError as exc:
                    raise CoordinatorUnreachable(f"the coordinator's log: {exc}") from exc
            raise CoordinatorUnreachable("the coordinator's log does not answer")

    async def _ask_once(self, question: ReceiptRequest | BidSetRequest, kind: type[R]) -> R:
        try:
            if self._stream is None:
                self._stream = await self._mesh.open(self._coordinator, LOG)
            await self._stream.send(encode(question))
            reply = decode_untrusted(await self._stream.receive(), kind)
        except RemoteProtocolError as exc:
            self.close()
            raise CoordinatorUnreachable(f"the coordinator's log: {exc}") from exc
        except BaseException:
            self.close()  # an answer that nobody waits for would be taken for the next one's
            raise
        if reply.request_id != question.request_id:
            self.close()
            raise CoordinatorUnreachable("the coordinator's log answered another question")
        return reply
