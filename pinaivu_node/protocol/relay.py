"""Reaching a peer that cannot be dialled, through a third that both have dialled.

    caller → relay      Reach(target)
    relay → target      Incoming(source), on a stream that the relay opens
    target → relay      Reached
    relay → caller      Reached, or Unreached with the reason
    then every frame, either way, is a chunk of bytes that the relay passes on as it came

What the chunks say is nothing to the relay: caller and target shake hands in them as on a socket of
their own, so that each proves to the other who it is and the relay sees ciphertext.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from pinaivu_node.protocol.ids import PeerIdField
from pinaivu_node.protocol.wire import Message

MAX_CHUNK_BYTES: Final = 64 * 1024
"""A longer frame ends the pipe: what waits at the relay stays small, and so do turns."""


class Reach(Message, kind="relay-reach/1"):
    """Connect me with this peer."""

    target: PeerIdField


class Incoming(Message, kind="relay-incoming/1"):
    """This peer, so the relay says, wants to reach you."""

    source: PeerIdField


class Reached(Message, kind="relay-reached/1"):
    """From now on chunks."""


class Unreached(Message, kind="relay-unreached/1"):
    """There is no pipe."""

    reason: Annotated[str, Field(max_length=200)]
