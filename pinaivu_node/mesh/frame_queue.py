"""A bounded queue of frames between a task of the mesh and tasks of its callers.

Bounded in bytes, because frames run from ten bytes to a mebibyte.  Every wait may be cancelled
without losing a frame: a frame leaves or enters in one step, after the last checkpoint.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import trio

from pinaivu_node.mesh.mesh import MeshError

QUEUE_BYTES: Final = 256 * 1024
"""What one stream may hold on each side: a second of tokens of 64 busy requests.  A frame longer
than the room that is left enters when the queue is empty, so 1 MiB frames pass one at a time."""
_FRAME_COST: Final = 64
"""What an empty frame counts for, so that a flood of them is bounded too."""


class FrameQueue:
    """First in, first out; closed with the error that its reader gets when it is drained."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._cost = 0
        self._reserved = 0
        self._closed: MeshError | None = None
        self._sealed = False
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def held(self) -> int:
        """Bytes in the queue, each frame's overhead included."""
        return self._cost

    async def put(self, frame: bytes) -> None:
        """Append a frame, after waiting for room; raises the error the queue was closed with."""
        await self.reserve(len(frame))
        self.put_reserved(frame)

    async def reserve(self, size: int) -> None:
        """Wait for room for a frame of `size` bytes and take it, for `put_reserved` to use."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._closed is not None:
                raise _fresh(self._closed)
            taken = self._cost + self._reserved
            if taken == 0 or taken + size + _FRAME_COST <= QUEUE_BYTES:
                self._reserved += size + _FRAME_COST
                return
            await self._writers.park()

    def put_reserved(self, frame: bytes) -> None:
        """Append a frame whose room was reserved; silently dropped if the queue is broken."""
        if self._sealed:
            return
        cost = len(frame) + _FRAME_COST
        self._reserved -= cost
        self._frames.append(frame)
        self._cost += cost
        self._readers.unpark()

    async def get(self) -> bytes:
        """The oldest frame; when drained and closed, raises what the queue was closed with."""
        await self.wait_for_frames()
        frame = self._frames.popleft()
        self._cost -= len(frame) + _FRAME_COST
        self._writers.unpark_all()
        return frame

    async def wait_for_frames(self) -> None:
        """Return when there is a frame to take; raises like `get`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._frames:
            if self._closed is not None and self._reserved == 0:
                raise _fresh(self._closed)
            await self._readers.park()

    def take_nowait(self, limit: int) -> list[bytes]:
        """The oldest frames up to about `limit` bytes together, at least one if there is one."""
        taken: list[bytes] = []
        size = 0
        while self._frames and (not taken or size + len(self._frames[0]) <= limit):
            frame = self._frames.popleft()
            size += len(frame)
            self._cost -= len(frame) + _FRAME_COST
            taken.append(frame)
        self._writers.unpark_all()
        return taken

    def cancel_reservation(self, size: int) -> None:
        """Give back room that was reserved for a frame that will not come."""
        if not self._sealed:
            self._reserved -= size + _FRAME_COST
            self._wake_all()

    def close(self, error: MeshError) -> None:
        """Take no more frames; those queued and reserved can still be read.  The first one wins."""
        if self._closed is None:
            self._closed = error
            self._wake_all()

    def lose(self, error: MeshError) -> None:
        """Take no more frames, not even those reserved; those queued can still be read."""
        if not self._sealed:
            self._sealed = True
            self._reserved = 0
            self.close(error)
            self._wake_all()

    def break_off(self, error: MeshError) -> None:
        """Take no more frames and forget those queued."""
        self._frames.clear()
        self._cost = 0
        self.lose(error)

    def _wake_all(self) -> None:
        self._readers.unpark_all()
        self._writers.unpark_all()


def _fresh(error: MeshError) -> MeshError:
    """The same error for each who meets it: one raised twice would carry both tracebacks."""
    return type(error)(*error.args)
