"""The frame header: version, type, flags, stream and length, twelve bytes in network order.  Pure.

    0       1       2       4               8               12
    +-------+-------+-------+---------------+---------------+
    |version| type  | flags |   stream id   |    length     |
    +-------+-------+-------+---------------+---------------+

`length` is the number of bytes that follow in a DATA frame, what is added to the window in a
WINDOW_UPDATE, the number to be echoed in a PING, and the reason in a GO_AWAY.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

HEADER: Final = struct.Struct("!BBHII")
HEADER_BYTES: Final = HEADER.size
VERSION: Final = 0
SESSION: Final = 0
"""The stream number of frames that concern the connection: PING and GO_AWAY."""

# Types.  Plain numbers, not an enum: they are compared once per frame.
DATA: Final = 0
WINDOW_UPDATE: Final = 1
PING: Final = 2
GO_AWAY: Final = 3

# Flags.
SYN: Final = 1
ACK: Final = 2
FIN: Final = 4
RST: Final = 8

INITIAL_WINDOW: Final = 256 * 1024
"""What either side may send on a new stream before it is given more; fixed by the protocol."""
MAX_WINDOW: Final = 2**32 - 1
"""What the length field can say, and so the most that a window can be."""


class Reason(enum.IntEnum):
    """Why a side goes away."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


def pack(kind: int, flags: int, stream: int, length: int) -> bytes:
    """One header as it goes on the wire."""
    return HEADER.pack(VERSION, kind, flags, stream, length)
