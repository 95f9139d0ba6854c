"""One long-lived stream to one peer, opened again whenever it is lost.

A provider and a gateway each keep such a session with their coordinator, and a gateway one with
each provider that it buys from.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import assert_never

import trio

from pinaivu_node.mesh.backoff import Backoff
from pinaivu_node.mesh.mesh import (
    FrameStream,
    Mesh,
    MeshError,
    PeerConnected,
    PeerEvent,
)
from pinaivu_node.mesh.serving import BAN_DURATION
from pinaivu_node.protocol.errors import PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId

logger = logging.getLogger(__name__)


async def keep_session(
    mesh: Mesh,
    peer: PeerId,
    protocol: str,
    serve: Callable[[FrameStream], Awaitable[None]],
    *,
    backoff: Backoff | None = None,
    dice: Callable[[], float] = random.random,
) -> None:
    """Run `serve` on a stream of `protocol` to `peer`, again and again until cancelled.

    Waits for the peer to be connected; connecting is the mesh's work, see `Mesh.keep`.  `serve`
    owns the stream while it runs; afterwards the stream is reset.  When it returns or raises a
    MeshError the session is opened again: soon if it lasted, after a growing delay if not.  After
    a RemoteProtocolError too, with what its action asks for done to the peer.  Any other exception
    goes to the caller.
    """
    backoff = backoff or Backoff()
    failures = 0
    async with mesh.watch_peers() as events:
        while True:
            await _wait_for(peer, mesh, events)
            started_at = trio.current_time()
            try:
                await _serve_once(mesh, peer, protocol, serve)
            except MeshError as exc:
                logger.debug("session %s with %s ended: %s", protocol, peer, exc)
            except RemoteProtocolError as exc:
                logger.warning("session %s with %s: %s", protocol, peer, exc)
                await _act_on(exc, peer, mesh)
            if trio.current_time() - started_at > backoff.ceiling:
                failures = 0
            failures += 1
            await trio.sleep(backoff.delay(failures, dice=dice()))


async def _serve_once(
    mesh: Mesh, peer: PeerId, protocol: str, serve: Callable[[FrameStream], Awaitable[None]]
) -> None:
    stream = await mesh.open(peer, protocol)
    try:
        await serve(stream)
    finally:
        stream.reset()


async def _act_on(error: RemoteProtocolError, peer: PeerId, mesh: Mesh) -> None:
    match error.action:
        case PeerAction.IGNORE:
            pass
        case PeerAction.DISCONNECT:
            await mesh.disconnect(peer)
        case PeerAction.BAN:
            mesh.ban(peer, duration=BAN_DURATION)
        case _:
            assert_never(error.action)


async def _wait_for(peer: PeerId, mesh: Mesh, events: AsyncIterator[PeerEvent]) -> None:
    while peer not in mesh.peers():
        async for event in events:
            if event == PeerConnected(peer):
                break
