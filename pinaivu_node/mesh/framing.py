"""Frames on a byte stream.  Pure.

    frame  = uvarint(length) type payload        length counts the type byte and the payload
    type   = 0 DATA, payload up to MAX_FRAME_BYTES
           | 1 END, no payload

END is a frame of its own because the end of bytes proves nothing here: py-libp2p reports a reset
and a lost connection as a clean end of stream.
"""

from __future__ import annotations

from typing import Final

from pinaivu_node.mesh.mesh import MAX_FRAME_BYTES
from pinaivu_node.protocol.errors import LocalProtocolError, RemoteProtocolError

_DATA: Final = 0
_END: Final = 1
_MAX_LENGTH: Final = MAX_FRAME_BYTES + 1
_MAX_UVARINT_BYTES: Final = 3
"""Three bytes of seven bits each spell more than _MAX_LENGTH; a fourth is somebody's attack."""

END_FRAME: Final = bytes([1, _END])
"""The whole END frame as it is on the wire."""


class EndOfFrames:
    """What `FrameDecoder` returns for the END frame; there is one, `END`."""

    __slots__ = ()


END: Final = EndOfFrames()


def check_frame_size(frame: bytes) -> None:
    """Refuse a frame that no peer would take: LocalProtocolError."""
    if len(frame) > MAX_FRAME_BYTES:
        raise LocalProtocolError(
            f"a frame of {len(frame)} bytes exceeds the limit of {MAX_FRAME_BYTES}"
        )


def encode_frame(frame: bytes) -> bytes:
    """One DATA frame as it goes on the wire; LocalProtocolError when it is too long."""
    return frame_head(frame) + frame


def frame_head(frame: bytes) -> bytes:
    """What goes on the wire before this frame; LocalProtocolError when it is too long."""
    length = len(frame) + 1
    if length < 0x80:
        return _SHORT_HEADS[length]
    check_frame_size(frame)
    return _uvarint(length) + _DATA_TYPE


class FrameDecoder:
    """Turns bytes as they arrive into frames.

    Holds at most one unfinished frame, in the pieces it arrives in: a long one is put together
    once, when its last piece is there.  After an error nothing more may be fed: the stream can no
    longer be understood.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._held = 0
        self._wanted = 0
        self._ended = False

    @property
    def held(self) -> int:
        """Bytes of the unfinished frame, for the budget of its peer."""
        return self._held

    def feed_untrusted(self, data: bytes) -> list[bytes | EndOfFrames]:
        """The frames that `data` completes, in order; END is the last there can be."""
        if self._held:
            self._pieces.append(data)
            self._held += len(data)
            if self._held < self._wanted:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
        frames: list[bytes | EndOfFrames] = []
        start, size = 0, len(data)
        wanted = 0
        while start < size:
            length, body = data[start], start + 1
            if length >= 0x80:
                length, body = _long_length(data, start)
            end = body + length
            if end > size or not length:
                wanted = self._check_unfinished(data, start, length, body)
                break
            if data[body] == _DATA and not self._ended:
                frames.append(data[body + 1 : end])
            else:
                frames.append(self._end(data[body:end]))
            start = end
        self._held, self._wanted = size - start, wanted
        if start < size:
            self._pieces.append(data[start:])
        return frames

    def _check_unfinished(self, data: bytes, start: int, length: int, body: int) -> int:
        """How many bytes the unfinished frame at `start` will have, at least."""
        if length > _MAX_LENGTH or (length < 1 and body <= len(data)):
            raise RemoteProtocolError(f"a frame of {length} bytes")
        return max(body + length, len(data) + 1) - start

    def _end(self, frame: bytes) -> EndOfFrames:
        if self._ended:
            raise RemoteProtocolError("a frame after END")
        if frame != END_FRAME[1:]:
            raise RemoteProtocolError(f"a frame of unknown type {frame[0]}")
        self._ended = True
        return END


def _long_length(data: bytes, start: int) -> tuple[int, int]:
    """The length of two or three bytes spelled at `start`, and where its frame begins.

    If the data ends before the length does, the frame is said to begin after the end.
    """
    length = 0
    for index, byte in enumerate(data[start : start + _MAX_UVARINT_BYTES]):
        length |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return length, start + index + 1
    if len(data) - start >= _MAX_UVARINT_BYTES:
        raise RemoteProtocolError("a frame length of more than three bytes")
    return 0, len(data) + 1


def _uvarint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


_DATA_TYPE: Final = bytes([_DATA])
_SHORT_HEADS: Final = tuple(bytes([length, _DATA]) for length in range(0x80))
"""What `frame_head` says of the frames that are most frequent."""
