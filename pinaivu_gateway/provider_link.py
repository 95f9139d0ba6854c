"""The inference streams: one long-lived stream to each provider, all of its jobs on it.

A stream costs milliseconds to open, so they are opened ahead of need, to every provider of the
roster up to a bound, and again whenever they are lost.  One task per stream reads, one writes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import Final

import trio

from pinaivu_gateway.attempt import Attempt
from pinaivu_node.mesh.mesh import FrameStream, Mesh, MeshError
from pinaivu_node.mesh.session import keep_session
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId, RequestId
from pinaivu_node.protocol.inference import (
    TO_GATEWAY,
    Accept,
    Cancel,
    Dispatch,
    Done,
    Refuse,
    TokenDelta,
    Tokens,
)
from pinaivu_node.protocol.market import RosterEntry, SegmentOutcome
from pinaivu_node.protocol.signing import Signer
from pinaivu_node.protocol.topics import INFERENCE
from pinaivu_node.protocol.wire import decode_untrusted, encode

logger = logging.getLogger(__name__)

_Message = Accept | Refuse | Tokens | Done
_MESSAGES: Final[tuple[type[_Message], ...]] = TO_GATEWAY
_MAX_WAITING_BYTES: Final = 16 << 20
"""Frames that wait to be sent to one provider: sixteen of the longest prompts.  One that is
further behind does not read."""


class ProviderLink:
    """The stream to one provider, whichever it is at the moment."""

    def __init__(self, peer: PeerId, signer: Signer) -> None:
        self.peer: Final = peer
        self._signer: Final = signer
        self._attempts: dict[RequestId, Attempt] = {}
        self._stream: FrameStream | None = None
        self._opened = trio.Event()
        self._frames: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._something_waits = trio.Event()

    @property
    def is_open(self) -> bool:
        """Whether a dispatch would go out at once."""
        return self._stream is not None

    @property
    def is_idle(self) -> bool:
        """Whether no job of ours runs there."""
        return not self._attempts

    async def wait_open(self) -> None:
        """Return when the stream is open."""
        while self._stream is None:
            await self._opened.wait()

    def dispatch(self, attempt: Attempt, dispatch: Dispatch) -> None:
        """Send a job; what comes of it goes into `attempt`, until `drop`."""
        if self._stream is None:
            attempt.fail(SegmentOutcome.DIED, "the stream to it is lost")
            return
        self._attempts[attempt.request_id] = attempt
        self._send(encode(dispatch))

    def cancel(self, request_id: RequestId) -> None:
        """Ask the provider to stop; its Done follows."""
        if request_id in self._attempts:
            self._send(encode(Cancel(request_id=request_id)))

    def drop(self, request_id: RequestId) -> None:
        """Take in nothing more of this request.  Harmless when repeated."""
        self._attempts.pop(request_id, None)

    async def serve(self, stream: FrameStream) -> None:
        """Serve one stream until it ends, which raises what it ended with."""
        failure: MeshError | RemoteProtocolError | None = None
        self._open(stream)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, stream)
                # Kept, and raised outside: the caller tells errors by their type, and a nursery
                # would wrap them.
                try:
                    await self._read(stream)
                except (MeshError, RemoteProtocolError) as exc:
                    failure = exc
                nursery.cancel_scope.cancel()
        finally:
            self._close(failure)
        if failure is not None:
            raise failure

    def _open(self, stream: FrameStream) -> None:
        self._stream = stream
        self._frames.clear()
        self._waiting_bytes = 0
        self._opened.set()

    def _close(self, failure: Exception | None) -> None:
        self._stream = None
        self._opened = trio.Event()
        for attempt in self._attempts.values():
            if failure is None:
                attempt.fail(SegmentOutcome.CANCELLED, "we left")
            else:
                attempt.fail(SegmentOutcome.DIED, f"the stream to it was lost: {failure}")
        self._attempts.clear()

    async def _read(self, stream: FrameStream) -> None:
        while True:
            message = decode_untrusted(await stream.receive(), *_MESSAGES)
            now = trio.current_time()
            if isinstance(message, Tokens):
                for delta in message.deltas:
                    self._take_untrusted(delta.request_id, delta, now)
            else:
                self._take_untrusted(message.request_id, message, now)

    def _take_untrusted(
        self, request_id: RequestId, message: Accept | Refuse | TokenDelta | Done, now: float
    ) -> None:
        attempt = self._attempts.get(request_id)
        if attempt is None:
            return  # a late word on what we have dropped
        was_over = attempt.is_over
        voucher = attempt.take_untrusted(message, now=now)
        if isinstance(message, TokenDelta) and attempt.is_over and not was_over:
            # More than its client reads.  Whoever would stop the job waits for that client.
            self.cancel(request_id)
        if voucher is not None:
            self._send(encode(self._signer.seal(voucher)))

    def _send(self, frame: bytes) -> None:
        if self._stream is None:
            return
        self._frames.append(frame)
        self._waiting_bytes += len(frame)
        if self._waiting_bytes > _MAX_WAITING_BYTES:
            logger.warning("the provider %s does not read what it is sent", self.peer)
            self._stream.reset()  # its reader notices
        self._something_waits.set()

    async def _write(self, stream: FrameStream) -> None:
        try:
            while True:
                while self._frames:
                    frame = self._frames.popleft()
                    self._waiting_bytes -= len(frame)
                    await stream.send(frame)
                self._something_waits = trio.Event()
                await self._something_waits.wait()
        except MeshError as exc:
            logger.debug("the stream to %s: %s", self.peer, exc)
            stream.reset()  # its reader notices


class ProviderLinks:
    """Links to everyone we buy from or might soon."""

    def __init__(
        self,
        mesh: Mesh,
        signer: Signer,
        nursery: trio.Nursery,
        *,
        max_links: int,
        linger: float,
    ) -> None:
        self._mesh = mesh
        self._signer = signer
        self._nursery = nursery
        self._max_links = max_links
        self._linger = linger
        self._links: dict[PeerId, ProviderLink] = {}
        self._listed: frozenset[PeerId] = frozenset()

    def is_open(self, peer: PeerId) -> bool:
        """Whether the stream to this provider is open."""
        link = self._links.get(peer)
        return link is not None and link.is_open

    def follow(self, providers: Iterable[RosterEntry]) -> None:
        """Link to the providers of a new roster; those who are no longer in it may linger."""
        listed = []
        for entry in providers:
            listed.append(entry.peer)
            if entry.peer in self._links or len(self._links) < self._max_links:
                self.link_to(entry.peer, entry.addresses)
        self._listed = frozenset(listed)

    def link_to(self, peer: PeerId, addresses: Iterable[str]) -> ProviderLink:
        """The link to this provider, being opened if it is new."""
        for address in addresses:
            self._keep(peer, address)
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = ProviderLink(peer, self._signer)
            self._nursery.start_soon(self._run, link)
        return link

    def _keep(self, peer: PeerId, address: str) -> None:
        if not address.endswith(f"/p2p/{peer}"):
            return  # it would connect us to somebody else
        try:
            self._mesh.keep(address)
        except MeshError as exc:
            logger.debug("an address of the provider %s is of no use: %s", peer, exc)

    async def _run(self, link: ProviderLink) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_when_unlisted, link, nursery.cancel_scope)
                await keep_session(self._mesh, link.peer, INFERENCE, link.serve)
        except Exception:
            # The edge of one provider: the next roster makes a new link.
            logger.exception("the link to the provider %s failed", link.peer)
        finally:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
            self._mesh.forget(link.peer)

    async def _cancel_when_unlisted(self, link: ProviderLink, scope: trio.CancelScope) -> None:
        """Let go of a provider that nobody lists any more and that works for nobody here.

        Not at once: after a restart of the coordinator everybody is unlisted for a moment.
        """
        unused_since = trio.current_time()
        while trio.current_time() - unused_since < self._linger:
            await trio.sleep(self._linger / 4)
            if link.peer in self._listed or not link.is_idle:
                unused_since = trio.current_time()
        scope.cancel()
