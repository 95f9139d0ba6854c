"""Whose fault it was, and what is to be done about it."""

from __future__ import annotations

import enum


class PeerAction(enum.Enum):
    """What the one who noticed a fault asks the mesh to do with the peer who caused it."""

    IGNORE = "ignore"
    """Drop the message: an honest peer can cause this by being late or restarted."""
    DISCONNECT = "disconnect"
    """Close the connection: the peer's stream can no longer be understood."""
    BAN = "ban"
    """Refuse the peer for a while: no honest implementation does this."""


class ProtocolError(Exception):
    """Something said between peers breaks the protocol."""


class LocalProtocolError(ProtocolError):
    """Our own bug: we were about to say something that no peer should accept."""


class RemoteProtocolError(ProtocolError):
    """A peer's fault.  The only error that a function ending in `_untrusted` raises."""

    def __init__(self, message: str, *, action: PeerAction = PeerAction.DISCONNECT) -> None:
        super().__init__(message)
        self.action = action
