"""Finding a coordinator among the addresses that an operator was given.

A list may name one coordinator several times, for its ways in (TCP, WebSocket), and several
coordinators.  A peer deals with one of them: its money and its proofs are in that one's books.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence

import trio

from pinaivu_node.mesh.address import split_address
from pinaivu_node.mesh.backoff import Backoff
from pinaivu_node.mesh.mesh import Mesh, PeerUnreachable
from pinaivu_node.protocol.ids import PeerId

logger = logging.getLogger(__name__)


def by_peer(addresses: Iterable[str]) -> dict[PeerId, list[str]]:
    """Who is named, in the order of the list, each with its addresses.

    Raises PeerUnreachable for a text that can never be dialled.
    """
    peers: dict[PeerId, list[str]] = {}
    for address in addresses:
        _, peer = split_address(address)
        peers.setdefault(peer, []).append(address)
    return peers


async def join_coordinator(
    mesh: Mesh,
    addresses: Sequence[str],
    *,
    backoff: Backoff | None = None,
    dice: Callable[[], float] = random.random,
) -> PeerId:
    """The first of these coordinators that can be reached, kept from now on at all its addresses.

    Returns at once where only one is named, whether it can be reached yet or not.  With several,
    tries them in the order of the list, again and again until one answers.  Raises PeerUnreachable
    for an empty list and for a text that can never be dialled.
    """
    peers = by_peer(addresses)
    if not peers:
        raise PeerUnreachable("no coordinator is named")
    chosen = next(iter(peers))
    if len(peers) > 1:
        chosen = await _first_to_answer(mesh, addresses, backoff or Backoff(), dice)
    for address in peers[chosen]:
        mesh.keep(address)
    return chosen


async def _first_to_answer(
    mesh: Mesh, addresses: Sequence[str], backoff: Backoff, dice: Callable[[], float]
) -> PeerId:
    failures = 0
    while True:
        for address in addresses:
            try:
                return await mesh.dial(address)
            except PeerUnreachable as exc:
                logger.info("tried another coordinator: %s", exc)
        failures += 1
        await trio.sleep(backoff.delay(failures, dice=dice()))
