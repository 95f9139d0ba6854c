"""Answers anyone who asks what became of a request: its receipt, its bid set.

Both are public once they exist; neither holds a word of prompt or answer.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import trio

from pinaivu_node.coordinator.pace import Pace
from pinaivu_node.coordinator.store import Store
from pinaivu_node.mesh.mesh import FrameStream, StreamEnded
from pinaivu_node.protocol.ids import PeerId
from pinaivu_node.protocol.receipt import (
    TO_LOG,
    BidSetReply,
    BidSetRequest,
    ReceiptReply,
    ReceiptRequest,
)
from pinaivu_node.protocol.wire import decode_untrusted, encode

_QUESTIONS: Final[tuple[type[ReceiptRequest | BidSetRequest], ...]] = TO_LOG
_REMEMBERED_PEERS: Final = 1024
"""Whose pace is kept across streams; one that falls out starts anew, which takes a thousand."""


class LogDesk:
    """Serves the log protocol."""

    def __init__(self, store: Store, *, requests_per_second: int) -> None:
        self._store = store
        self._rate = requests_per_second
        self._paces: OrderedDict[PeerId, Pace] = OrderedDict()

    async def serve(self, stream: FrameStream) -> None:
        """Answer one stream's questions, one after another, until it ends."""
        try:
            while True:
                question = decode_untrusted(await stream.receive(), *_QUESTIONS)
                await trio.sleep(self._wait(stream.peer))
                await stream.send(await self._answer(question))
        except StreamEnded:
            await stream.end()

    def _wait(self, peer: PeerId) -> float:
        now = trio.current_time()
        pace = self._paces.pop(peer, None) or Pace(self._rate, now=now)
        self._paces[peer] = pace
        if len(self._paces) > _REMEMBERED_PEERS:
            self._paces.popitem(last=False)
        return pace.take(now)

    async def _answer(self, question: ReceiptRequest | BidSetRequest) -> bytes:
        request_id = question.request_id
        if isinstance(question, ReceiptRequest):
            known = await self._store.receipt_reply(request_id)
            return known or encode(ReceiptReply(request_id=request_id, receipt=None))
        known = await self._store.bid_set(request_id)
        return known or encode(BidSetReply(request_id=request_id, leaves=None))
