"""Running a handler on an inbound stream, and doing with the peer what the handler asks for."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final, Protocol, assert_never

from pinaivu_node.mesh.mesh import FrameStream, MeshError, StreamHandler
from pinaivu_node.protocol.errors import PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import Milliseconds, PeerId

logger = logging.getLogger(__name__)

BAN_DURATION: Final = Milliseconds(10 * 60 * 1000)
"""Ten minutes: long enough to make abuse slow, short enough to forgive a bad release."""


class ServedStream(FrameStream, Protocol):
    """A stream that knows whether END was said on it."""

    @property
    def is_ending(self) -> bool:
        """Whether what is queued should still go out."""
        ...


class Sanctions(Protocol):
    """What a mesh does about a peer."""

    def hang_up(self, peer: PeerId, reason: str) -> None:
        """Close every connection to this peer and say why, once."""
        ...

    def ban(self, peer: PeerId, *, duration: Milliseconds) -> None:
        """As `Mesh.ban`."""
        ...


class Serving:
    """Handlers at work, counted for each peer: one may outlive its stream, and its connection.

    A peer that opens streams and resets them, or connects anew, would else pile up handlers
    without end, each with its task and what it holds.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: Counter[PeerId] = Counter()

    async def serve(
        self, handler: StreamHandler, stream: ServedStream, sanctions: Sanctions
    ) -> None:
        """See `serve_stream`; resets the stream if too many handlers of its peer are at work."""
        peer = stream.peer
        if self._running[peer] >= self._limit:
            logger.debug("a stream of %s was refused: %d handlers are at work", peer, self._limit)
            stream.reset()
            return
        self._running[peer] += 1
        try:
            await serve_stream(handler, stream, sanctions)
        finally:
            self._running[peer] -= 1
            if not self._running[peer]:
                del self._running[peer]


async def serve_stream(handler: StreamHandler, stream: ServedStream, sanctions: Sanctions) -> None:
    """Run `handler`; whatever it raises stays here.

    Resets the stream afterwards, unless the handler returned after `end`: then what it queued
    still goes out.
    """
    try:
        await handler(stream)
    except RemoteProtocolError as exc:
        act_on(exc, stream.peer, sanctions)
        stream.reset()
    except MeshError as exc:
        logger.debug("a stream of %s ended: %s", stream.peer, exc)
        stream.reset()
    except Exception:
        logger.exception("a handler failed on a stream of %s", stream.peer)
        stream.reset()
    else:
        if not stream.is_ending:
            stream.reset()


def act_on(error: RemoteProtocolError, peer: PeerId, sanctions: Sanctions) -> None:
    """Carry out what the one who noticed the fault decided."""
    match error.action:
        case PeerAction.IGNORE:
            pass
        case PeerAction.DISCONNECT:
            sanctions.hang_up(peer, str(error))
        case PeerAction.BAN:
            sanctions.hang_up(peer, str(error))
            sanctions.ban(peer, duration=BAN_DURATION)
        case _:
            assert_never(error.action)
