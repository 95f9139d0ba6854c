"""Passing on bytes between two peers, neither of whom the other can dial.

See `protocol.relay` for what is said.  A relay keeps nothing but counts; what it gives away is
bounded by `pipes.RelayLimits`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from pinaivu_node.mesh.mesh import FrameStream, MeshError, PeerUnreachable
from pinaivu_node.mesh.pipes import Pipe, PipeBook, RelayLimits
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId
from pinaivu_node.protocol.relay import MAX_CHUNK_BYTES, Incoming, Reach, Reached, Unreached
from pinaivu_node.protocol.topics import RELAY
from pinaivu_node.protocol.wire import decode_untrusted, encode

logger = logging.getLogger(__name__)

Open = Callable[[PeerId, str], Awaitable[FrameStream]]
Accept = Callable[[FrameStream, PeerId], Awaitable[None]]

_REQUESTS: Final[tuple[type[Reach | Incoming], ...]] = (Reach, Incoming)
_ANSWER_S: Final = 4.0
"""For a relay or a target to answer; less than what a dial may take in all."""


class Relay:
    """The relay's part, and the target's: whoever serves `RELAY` may be asked for either.

    `open` is the mesh's.  `limits` None: nothing is passed on.  `accept` is given each pipe that
    ends here, with who is said to be at its other end, for as long as it is used; only pipes from
    `relays` are.
    """

    def __init__(
        self,
        open_stream: Open,
        accept: Accept,
        *,
        limits: RelayLimits | None,
        relays: frozenset[PeerId],
    ) -> None:
        self._open = open_stream
        self._accept = accept
        self._relays = relays
        self.book = None if limits is None else PipeBook(limits)

    async def serve(self, stream: FrameStream) -> None:
        """Serve one inbound stream of `RELAY` to its end."""
        request: Reach | Incoming | None = None
        with trio.move_on_after(_ANSWER_S):
            request = decode_untrusted(await stream.receive(), *_REQUESTS)
        if request is None:
            return
        if isinstance(request, Reach):
            await self._pass_on(stream, request.target)
        elif stream.peer in self._relays:
            await stream.send(encode(Reached()))
            await self._accept(stream, request.source)
        else:
            await _refuse(stream, "you are no relay of ours")

    async def _pass_on(self, stream: FrameStream, target: PeerId) -> None:
        if self.book is None:
            await _refuse(stream, "this peer is no relay")
            return
        pipe = self.book.open(stream.peer, target)
        if isinstance(pipe, str):
            await _refuse(stream, pipe)
            return
        try:
            await self._join(stream, pipe, self.book)
        finally:
            self.book.close(pipe)

    async def _join(self, stream: FrameStream, pipe: Pipe, book: PipeBook) -> None:
        source, target = pipe.ends
        try:
            onward = await self._open(target, RELAY)
        except PeerUnreachable:
            await _refuse(stream, "it is not connected here")
            return
        try:
            await ask(onward, Incoming(source=source))
            await stream.send(encode(Reached()))
            with trio.move_on_after(book.limits.seconds_per_pipe):
                async with trio.open_nursery() as nursery:
                    scope = nursery.cancel_scope
                    nursery.start_soon(_pump, stream, onward, pipe, book, scope)
                    nursery.start_soon(_pump, onward, stream, pipe, book, scope)
        except MeshError as exc:
            await _refuse(stream, str(exc)[:200])
        finally:
            onward.reset()


async def reach(stream: FrameStream, target: PeerId) -> None:
    """As the caller, turn a stream to a relay into a pipe to this peer.

    Raises PeerUnreachable if the relay says no, or says nothing.
    """
    try:
        await ask(stream, Reach(target=target))
    except PeerUnreachable:
        raise
    except MeshError as exc:
        raise PeerUnreachable(f"the relay hung up: {exc}") from exc


async def ask(stream: FrameStream, request: Reach | Incoming) -> None:
    """Say what is wanted, and wait for Reached; PeerUnreachable if that is not what comes."""
    await stream.send(encode(request))
    try:
        with trio.fail_after(_ANSWER_S):
            answer = decode_untrusted(await stream.receive(), Reached, Unreached)
    except trio.TooSlowError:
        raise PeerUnreachable(f"{stream.peer} did not answer in {_ANSWER_S:g} s") from None
    except RemoteProtocolError as exc:
        raise PeerUnreachable(f"{stream.peer} answered nonsense: {exc}") from exc
    if isinstance(answer, Unreached):
        raise PeerUnreachable(f"{stream.peer} refused: {answer.reason}")


async def _refuse(stream: FrameStream, reason: str) -> None:
    await stream.send(encode(Unreached(reason=reason)))
    await stream.end()


async def _pump(
    source: FrameStream, sink: FrameStream, pipe: Pipe, book: PipeBook, scope: trio.CancelScope
) -> None:
    """Pass on what comes, until either end is lost or the pipe may carry no more."""
    try:
        while True:
            chunk = await source.receive()
            if len(chunk) > MAX_CHUNK_BYTES:
                break
            wait = book.pass_on(pipe, source.peer, len(chunk), now=trio.current_time())
            if wait is None:
                break
            if wait:
                await trio.sleep(wait)
            with trio.fail_after(book.limits.stall):
                await sink.send(chunk)
    except (MeshError, trio.TooSlowError) as exc:
        logger.debug("the pipe %s ended: %s", pipe.ends, exc)
    scope.cancel()
