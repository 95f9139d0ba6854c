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
    check_frame_size(frame)
    return b"%b%c%b" % (_uvarint(len(frame) + 1), _DATA, frame)


class FrameDecoder:
    """Turns bytes as they arrive into frames.

    Holds at most one unfinished frame.  After an error nothing more may be fed: the stream can no
    longer be understood.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ended = False

    @property
    def held(self) -> int:
        """Bytes of the unfinished frame, for the budget of its peer."""
        return len(self._buffer)

    def feed_untrusted(self, data: bytes) -> list[bytes | EndOfFrames]:
        """The frames that `data` completes, in order; END is the last there can be."""
        buffer = self._buffer
        buffer += data
        frames: list[bytes | EndOfFrames] = []
        start = 0
        while (found := self._length_at(start)) is not None:
            length, body = found
            if len(buffer) < body + length:
                break
            if self._ended:
                raise RemoteProtocolError("a frame after END")
            frames.append(self._frame(bytes(buffer[body : body + length])))
            start = body + length
        if start:
            del buffer[:start]
        return frames

    def _length_at(self, start: int) -> tuple[int, int] | None:
        """The length spelled at `start` and where its frame begins; None if more is needed."""
        length = 0
        for index, byte in enumerate(self._buffer[start : start + _MAX_UVARINT_BYTES]):
            length |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if not 1 <= length <= _MAX_LENGTH:
                    raise RemoteProtocolError(f"a frame of {length} bytes")
                return length, start + index + 1
        if len(self._buffer) - start >= _MAX_UVARINT_BYTES:
            raise RemoteProtocolError("a frame length of more than three bytes")
        return None

    def _frame(self, frame: bytes) -> bytes | EndOfFrames:
        if frame[0] == _DATA:
            return frame[1:]
        if frame[0] == _END and len(frame) == 1:
            self._ended = True
            return END
        raise RemoteProtocolError(f"a frame of unknown type {frame[0]}")


def _uvarint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
