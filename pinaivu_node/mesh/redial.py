"""Staying connected to the peers that we were told to keep."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count

import trio

from pinaivu_node.mesh.address import split_address
from pinaivu_node.mesh.backoff import Backoff
from pinaivu_node.mesh.mesh import PeerUnreachable
from pinaivu_node.mesh.presence import Presence
from pinaivu_node.protocol.ids import PeerId

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Kept:
    addresses: list[str]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Redialer:
    """Keeps peers connected, one parked task each, in the nursery of the mesh that owns it."""

    def __init__(
        self,
        nursery: trio.Nursery,
        presence: Presence,
        dial: Callable[[str], Awaitable[PeerId]],
        *,
        random: Callable[[], float],
        backoff: Backoff,
    ) -> None:
        self._nursery = nursery
        self._presence = presence
        self._dial = dial
        self._random = random
        self._backoff = backoff
        self._kept: dict[PeerId, _Kept] = {}
        self.redials = 0

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._kept

    def keep(self, address: str) -> None:
        """Dial this address now and whenever its peer is lost, in turn with its other ones.

        Raises PeerUnreachable for a text that can never be dialled.
        """
        _, peer = split_address(address)
        if (kept := self._kept.get(peer)) is not None:
            if address not in kept.addresses:
                kept.addresses.append(address)
            return
        self._kept[peer] = kept = _Kept([address])
        self._nursery.start_soon(self._stay_connected, peer, kept)

    def forget(self, peer: PeerId) -> None:
        """Undo `keep`."""
        if (kept := self._kept.pop(peer, None)) is not None:
            kept.scope.cancel()

    def forget_all(self) -> None:
        """Undo every `keep`, as when the mesh closes."""
        for peer in list(self._kept):
            self.forget(peer)

    async def _stay_connected(self, peer: PeerId, kept: _Kept) -> None:
        failures = 0
        with kept.scope:
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
                await self._try_to_dial(kept.addresses[turn % len(kept.addresses)])

    async def _try_to_dial(self, address: str) -> None:
        try:
            await self._dial(address)
        except PeerUnreachable as exc:
            logger.debug("redial: %s", exc)
