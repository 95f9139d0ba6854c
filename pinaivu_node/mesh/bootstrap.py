"""Finding a coordinator among the addresses that an operator was given.

A list may name one coordinator several times, for its ways in (TCP, WebSocket), and several
coordinators.  A peer deals with one of them: its money and its proofs are in that one's books.

There is no distributed hash table to find more of them in.  py-libp2p's works on our connections
(provided in 0.1 s among eight peers, found at once), but whoever wants to can have the list: it
holds twenty names, and names are free.  It also speaks `/ipfs/kad/1.0.0` whatever prefix it is
given, bounds neither the keys that strangers leave with a coordinator nor whom a search connects
us with, and what it finds nobody has chosen.  A list in a file does not have these faults.
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


async def named_or_found(addresses: tuple[str, ...], *, lan: bool) -> tuple[str, ...]:
    """These addresses, or where there are none those of a coordinator on the local network.

    Waits for one to be found.  Raises MeshError if there is no network to look on.
    """
    if addresses or not lan:
        return addresses
    # Here, since zeroconf takes a tenth of a second to import, and few ask for it.
    from pinaivu_node.mesh.lan import find_coordinator

    logger.info("looking for a coordinator on the local network")
    found = await find_coordinator()
    logger.info("found the coordinator %s", found[0])
    return found


def relays_of(addresses: Iterable[str], more: Iterable[str] = ()) -> tuple[str, ...]:
    """For `MeshConfig.relays`: these coordinators, and the relays that are named besides.

    Coordinators pass others on to us where they may, and those others know the same ones.
    """
    return (*more, *(f"/p2p/{peer}" for peer in by_peer(addresses)))


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
