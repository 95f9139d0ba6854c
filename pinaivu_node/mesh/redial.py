"""Staying connected to the peers that we were told to keep."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Final

import trio

from pinaivu_node.mesh.address import is_circuit, split_address, split_circuit
from pinaivu_node.mesh.backoff import Backoff
from pinaivu_node.mesh.mesh import PeerUnreachable
from pinaivu_node.mesh.presence import Presence
from pinaivu_node.protocol.ids import PeerId

logger = logging.getLogger(__name__)

_MAX_ADDRESSES: Final = 16
"""Of one peer and sort: twice what it can tell of itself at once.  The oldest makes room."""
_HEAD_START: Final = 1.0
"""Seconds that a direct way is tried, by either side, before one through a relay: three round trips
to the other end of the world."""
_STAGGER: Final = 0.3
"""Seconds until the next address is tried beside one that has not answered: a firewall that drops
what it does not like would else cost the whole time that a dial may take."""
_STRAIGHTEN: Final = Backoff(first=10.0, ceiling=600.0)
"""How often a direct way is looked for while there is one through a relay."""


@dataclass(eq=False, slots=True)
class _Kept:
    direct: list[str] = field(default_factory=list)
    circuits: list[str] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def add(self, address: str) -> None:
        known = self.circuits if is_circuit(address) else self.direct
        if address not in known:
            known.append(address)
            del known[:-_MAX_ADDRESSES]


class Redialer:
    """Keeps peers connected, two parked tasks each, in the nursery of the mesh that owns it.

    A peer that tells of ways through relays is dialled through one only when it cannot be reached
    directly, and directly again from time to time for as long as `is_detour` says that it is
    connected through relays alone.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        presence: Presence,
        dial: Callable[[str], Awaitable[PeerId]],
        *,
        random: Callable[[], float],
        backoff: Backoff,
        is_detour: Callable[[PeerId], bool] = lambda _: False,
    ) -> None:
        self._nursery = nursery
        self._presence = presence
        self._dial = dial
        self._random = random
        self._backoff = backoff
        self._is_detour = is_detour
        self._kept: dict[PeerId, _Kept] = {}
        self.redials = 0

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._kept

    def peers(self) -> set[PeerId]:
        """Whom we stay connected to."""
        return set(self._kept)

    def keep(self, address: str) -> None:
        """Dial this address now and whenever its peer is lost, in turn with its other ones.

        Raises PeerUnreachable for a text that can never be dialled.
        """
        location, peer = split_address(address)
        if is_circuit(location):
            split_circuit(location)
        if (kept := self._kept.get(peer)) is not None:
            kept.add(address)
            return
        self._kept[peer] = kept = _Kept()
        kept.add(address)
        self._nursery.start_soon(self._keep, peer, kept)

    def forget(self, peer: PeerId) -> None:
        """Undo `keep`."""
        if (kept := self._kept.pop(peer, None)) is not None:
            kept.scope.cancel()

    def forget_all(self) -> None:
        """Undo every `keep`, as when the mesh closes."""
        for peer in list(self._kept):
            self.forget(peer)

    async def _keep(self, peer: PeerId, kept: _Kept) -> None:
        with kept.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stay_connected, peer, kept)
                nursery.start_soon(self._straighten, peer, kept)

    async def _stay_connected(self, peer: PeerId, kept: _Kept) -> None:
        failures = 0
        for turn in count():
            connected_at = trio.current_time()
            await self._presence.wait_lost(peer)
            # A peer that takes our calls only to hang up is as good as one that does not.
            if trio.current_time() - connected_at > self._backoff.ceiling:
                failures = 0
            if failures:
                delay = self._backoff.delay(failures, dice=self._random())
                await trio.sleep(delay)
            failures += 1
            self.redials += turn > 0
            await self._dial_somehow(peer, kept, turn)

    async def _dial_somehow(self, peer: PeerId, kept: _Kept, turn: int) -> None:
        """Try every way there is, one soon after another, until one leads there or all fail."""
        async with trio.open_nursery() as nursery:

            async def attempt(address: str, after: float) -> None:
                await trio.sleep(after)
                if peer in self._presence or await self._try_to_dial(address):
                    nursery.cancel_scope.cancel()

            for number, address in enumerate(_from(kept.direct, turn)[1:], 1):
                nursery.start_soon(attempt, address, number * _STAGGER)
            for address in _from(kept.circuits, turn)[:1]:
                # The other side will do the same: by chance one of us is first.
                nursery.start_soon(attempt, address, _HEAD_START * (1 + self._random()))
            for address in _from(kept.direct, turn)[:1]:
                await attempt(address, 0)

    async def _straighten(self, peer: PeerId, kept: _Kept) -> None:
        failures = 1
        while True:
            await trio.sleep(_STRAIGHTEN.delay(failures, dice=self._random()))
            if not self._is_detour(peer):
                failures = 1
                continue
            failures += 1
            for address in list(kept.direct):
                if await self._try_to_dial(address):
                    break

    async def _try_to_dial(self, address: str) -> bool:
        try:
            await self._dial(address)
        except PeerUnreachable as exc:
            logger.debug("redial: %s", exc)
            return False
        return True


def _from(addresses: list[str], turn: int) -> list[str]:
    """All of them, each first in its turn."""
    at = turn % len(addresses) if addresses else 0
    return addresses[at:] + addresses[:at]
