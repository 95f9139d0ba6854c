"""What makes the memory network run: who is reachable, and one task for all that happens later."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable

import trio

from pinaivu_node.protocol.ids import PeerId

Latency = Callable[[PeerId, PeerId], float]
"""Seconds from the one to the other."""


def reachable_from(start: PeerId, edges: Iterable[tuple[PeerId, PeerId]]) -> tuple[PeerId, ...]:
    """Everybody that a chain of edges leads to, `start` included, always in the same order."""
    neighbours: dict[PeerId, list[PeerId]] = {}
    for one, other in edges:
        neighbours.setdefault(one, []).append(other)
        neighbours.setdefault(other, []).append(one)
    # A dict, not a set: the order of deliveries must not depend on hashes of strings.
    found = {start: None}
    to_visit = [start]
    while to_visit:
        for peer in neighbours.get(to_visit.pop(), ()):
            if peer not in found:
                found[peer] = None
                to_visit.append(peer)
    return tuple(found)


class Clockwork:
    """Does things later, in order of time and then of asking; one task for all of them."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = itertools.count()
        self._sooner = trio.Event()

    def add(self, delay: float, action: Callable[..., None], arguments: tuple[object, ...]) -> None:
        """Do this when so many seconds have passed."""
        entry = (trio.current_time() + delay, next(self._order), action, arguments)
        heapq.heappush(self._due, entry)
        if self._due[0] is entry:
            self._sooner.set()

    async def run(self) -> None:
        """Do everything when it is due, until cancelled."""
        while True:
            self._sooner = trio.Event()
            next_at = self._due[0][0] if self._due else float("inf")
            with trio.CancelScope(deadline=next_at):
                await self._sooner.wait()
            now = trio.current_time()
            while self._due and self._due[0][0] <= now:
                _, _, action, arguments = heapq.heappop(self._due)
                action(*arguments)
