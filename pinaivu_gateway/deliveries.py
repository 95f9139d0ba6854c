"""Deliveries on their way to their receipts.

A delivery is durable before it is told: stored first, then sent, then sent again after every
reconnection and now and then between, until the receipt or an acknowledgement comes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque

import trio

from pinaivu_gateway.jobs import DeliveryOutbox
from pinaivu_node.protocol.ids import RequestId
from pinaivu_node.protocol.signing import Envelope

logger = logging.getLogger(__name__)


class Deliveries:
    """What was delivered and has no receipt yet."""

    def __init__(self, outbox: DeliveryOutbox, *, capacity: int) -> None:
        self._outbox = outbox
        self._capacity = capacity
        self._waiting: OrderedDict[RequestId, Envelope] = OrderedDict()
        self._to_send: deque[RequestId] = deque()
        self._to_remove: deque[RequestId] = deque()
        self._sendable = trio.Event()
        self._removable = trio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    async def load(self) -> None:
        """Take in what an earlier life left."""
        for request_id, envelope in await self._outbox.waiting():
            self._take(request_id, envelope)

    async def add(self, request_id: RequestId, envelope: Envelope) -> None:
        """Keep a delivery, and send it when it is durable.

        Told without being durable if the disk fails, or is so slow that the wait for it is
        cancelled: a delivery that the coordinator has is worth more than one that waits for a disk
        to be repaired.
        """
        try:
            await self._outbox.put(request_id, envelope)
        except Exception:
            logger.exception("cannot keep the delivery of %s", request_id)
        finally:
            self._take(request_id, envelope)

    def settle(self, request_id: RequestId) -> None:
        """Its receipt or acknowledgement has come; others are ignored."""
        if self._waiting.pop(request_id, None) is not None:
            self._to_remove.append(request_id)
            self._removable.set()

    def start_over(self) -> None:
        """Send everything again."""
        self._to_send = deque(self._waiting)
        self._sendable.set()

    async def next_to_send(self) -> Envelope:
        """The next that was not sent since `start_over`; waits for one."""
        while True:
            while self._to_send:
                envelope = self._waiting.get(self._to_send.popleft())
                if envelope is not None:
                    return envelope
            self._sendable = trio.Event()
            await self._sendable.wait()

    async def keep(self) -> None:
        """Forget on the disk what was settled, until cancelled.

        One that a crash brings back is sent once more and answered with its receipt again.
        """
        while True:
            while self._to_remove:
                request_id = self._to_remove.popleft()
                try:
                    await self._outbox.remove(request_id)
                except Exception:
                    logger.exception("cannot remove the delivery of %s", request_id)
            self._removable = trio.Event()
            await self._removable.wait()

    def _take(self, request_id: RequestId, envelope: Envelope) -> None:
        self._waiting[request_id] = envelope
        self._to_send.append(request_id)
        if len(self._waiting) > self._capacity:
            oldest = next(iter(self._waiting))
            logger.warning("gave up the delivery of %s: too many wait for a receipt", oldest)
            self.settle(oldest)
        self._sendable.set()
