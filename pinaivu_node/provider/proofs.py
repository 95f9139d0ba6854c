"""Proofs on their way to becoming money: kept until the coordinator has a receipt for each.

A proof is durable before it is told: written to disk first, then sent, then sent again after every
reconnection, until the receipt or an acknowledgement comes.  None of it is in a token's way.
"""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import trio

from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId, RequestId
from pinaivu_node.protocol.market import Proof
from pinaivu_node.protocol.signing import Envelope, open_untrusted
from pinaivu_node.protocol.wire import decode_untrusted, encode

logger = logging.getLogger(__name__)

_FILE_NAME: Final = re.compile(r"(req_[0-9a-f]{32})\.proof", re.ASCII)


class ProofSpool:
    """A folder with one file per proof.  Every method blocks on the disk and may raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, me: PeerId) -> list[tuple[RequestId, Envelope]]:
        """What an earlier life left, oldest first; files that hold no proof of ours stay unread."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        paths = [path for path in self._folder.iterdir() if _FILE_NAME.fullmatch(path.name)]
        loaded = []
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
            try:
                envelope = decode_untrusted(path.read_bytes(), Envelope)
                proof = open_untrusted(envelope, Proof, signer=me)
            except RemoteProtocolError as exc:
                logger.warning("%s holds no proof of this provider: %s", path, exc)
                continue
            loaded.append((proof.request_id, envelope))
        return loaded

    def store(self, proofs: Mapping[RequestId, Envelope]) -> None:
        """Write these; on return they survive a crash of the machine."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for request_id, envelope in proofs.items():
            draft = self._folder / f".{request_id}"
            with draft.open("wb") as file:
                file.write(encode(envelope))
                file.flush()
                os.fsync(file.fileno())
            draft.rename(self._path(request_id))
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, request_ids: Iterable[RequestId]) -> None:
        """Forget these.  One that comes back after a crash is sent once more, which is harmless."""
        for request_id in request_ids:
            self._path(request_id).unlink(missing_ok=True)

    def _path(self, request_id: RequestId) -> Path:
        return self._folder / f"{request_id}.proof"


class UnpaidProofs:
    """The proofs that no receipt has come for yet."""

    def __init__(self, spool: ProofSpool | None, *, capacity: int) -> None:
        """Without a spool a crash loses them: for simulated networks."""
        self._spool = spool
        self._capacity = capacity
        self._durable: OrderedDict[RequestId, Envelope] = OrderedDict()
        self._to_store: dict[RequestId, Envelope] = {}
        self._to_remove: list[RequestId] = []
        self._to_send: deque[RequestId] = deque()
        self._disk_work = trio.Event()
        self._sendable = trio.Event()

    def __len__(self) -> int:
        return len(self._durable) + len(self._to_store)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._durable or request_id in self._to_store

    def add(self, request_id: RequestId, envelope: Envelope) -> None:
        """Take a proof in; it goes to the coordinator when it is durable."""
        if self._spool is None:
            self._publish({request_id: envelope})
        else:
            self._to_store[request_id] = envelope
            self._disk_work.set()

    def settle(self, request_id: RequestId) -> bool:
        """Forget a proof that got its receipt; False if it was settled or unknown."""
        known = self._to_store.pop(request_id, None) or self._durable.pop(request_id, None)
        if known is None:
            return False
        if self._spool is not None:
            self._to_remove.append(request_id)
            self._disk_work.set()
        return True

    def start_over(self) -> None:
        """Send everything again: this is a new session with the coordinator."""
        self._to_send = deque(self._durable)

    async def next_to_send(self) -> Envelope:
        """The next durable proof that this session has not sent; waits for one."""
        while True:
            while self._to_send:
                if (envelope := self._durable.get(self._to_send.popleft())) is not None:
                    return envelope
            self._sendable = trio.Event()
            await self._sendable.wait()

    async def load(self, me: PeerId) -> None:
        """Take in what an earlier life left unpaid."""
        if self._spool is not None:
            self._publish(dict(await trio.to_thread.run_sync(_load, self._spool, me)))

    async def keep(self) -> None:
        """Do the disk's part until cancelled."""
        while True:
            await self._disk_work.wait()
            await self.flush()

    async def flush(self) -> None:
        """Bring the disk up to date now."""
        self._disk_work = trio.Event()
        to_store, to_remove = dict(self._to_store), self._to_remove
        self._to_remove = []
        if self._spool is None or not (to_store or to_remove):
            return
        try:
            await trio.to_thread.run_sync(_apply, self._spool, to_store, to_remove)
        except OSError as exc:
            # Told without being durable: a proof that the coordinator has is worth more than one
            # that waits for a disk to be repaired.
            logger.error("cannot keep proofs on disk: %s", exc)  # noqa: TRY400
        # One that was settled while it was being written is in the next batch, to be removed.
        self._publish(
            {each: self._to_store.pop(each) for each in to_store if each in self._to_store}
        )

    def _publish(self, proofs: Mapping[RequestId, Envelope]) -> None:
        self._durable.update(proofs)
        self._to_send.extend(proofs)
        while len(self._durable) > self._capacity:
            request_id, _ = self._durable.popitem(last=False)
            logger.warning("gave up the proof of %s: too many wait for a receipt", request_id)
            if self._spool is not None:
                self._to_remove.append(request_id)
                self._disk_work.set()
        self._sendable.set()


def _load(spool: ProofSpool, me: PeerId) -> list[tuple[RequestId, Envelope]]:
    try:
        return spool.load(me)
    except OSError as exc:
        logger.error("cannot read the proofs that wait for receipts: %s", exc)  # noqa: TRY400
        return []


def _apply(
    spool: ProofSpool, to_store: Mapping[RequestId, Envelope], to_remove: Iterable[RequestId]
) -> None:
    if to_store:
        spool.store(to_store)
    spool.remove(to_remove)
