"""What gossip leaves for one subscriber: bounded, and the oldest gives way."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from typing import Final, Self

import trio

from pinaivu_node.mesh.mesh import Delivery

INBOX_MESSAGES: Final = 1024
"""Ten seconds of a hundred auctions a second; an offer older than that is past its deadline."""
INBOX_BYTES: Final = 8 << 20
"""The same bound for long messages."""


class Inbox(AsyncIterator[Delivery]):
    """A mailbox that never makes its writer wait; iterated, it waits for mail for ever."""

    def __init__(self) -> None:
        self._deliveries: deque[Delivery] = deque()
        self._bytes = 0
        self._readers = trio.lowlevel.ParkingLot()

    def deliver(self, delivery: Delivery) -> int:
        """Append, dropping the oldest to make room; return how many were dropped."""
        dropped = 0
        self._deliveries.append(delivery)
        self._bytes += len(delivery.payload)
        while len(self._deliveries) > INBOX_MESSAGES or self._bytes > INBOX_BYTES:
            self._bytes -= len(self._deliveries.popleft().payload)
            dropped += 1
        self._readers.unpark()
        return dropped

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._deliveries:
            await self._readers.park()
        delivery = self._deliveries.popleft()
        self._bytes -= len(delivery.payload)
        return delivery
