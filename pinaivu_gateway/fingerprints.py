"""Names for the beginnings of a conversation that tell nobody what was said.

Each is an HMAC over everything up to one turn, under a secret of the client's API key: a provider
can recognise a prefix that it has in its cache, and can neither read it nor tell whether another
client's conversation begins alike.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import deque
from collections.abc import Sequence
from typing import Final

from pinaivu_node.protocol.inference import ChatTurn, ToolUse
from pinaivu_node.protocol.market import MAX_FINGERPRINTS
from pinaivu_node.protocol.wire import encode_body

FINGERPRINT_BYTES: Final = 16
"""Of 32: two of a billion prefixes meet by chance with a probability of 10⁻²¹."""


def fingerprint_chain(
    secret: bytes, turns: Sequence[ChatTurn], tools: ToolUse | None = None
) -> tuple[bytes, ...]:
    """The fingerprint of the conversation after each turn; of a very long one, the newest.

    The chain runs over whole digests, and only what leaves us is cut short.  It begins with the
    tools, because templates put them before everything that is said.
    """
    kept: deque[bytes] = deque(maxlen=MAX_FINGERPRINTS)
    digest = b""
    for tool in tools.tools if tools else ():
        digest = _link(secret, digest + _sized(encode_body(tool)))
    for turn in turns:
        # The lengths keep `ab` + `c` apart from `a` + `bc`.
        said = _sized(turn.role.encode()) + _sized(turn.content.encode())
        digest = _link(secret, digest + said + _calls_of(turn))
        kept.append(digest[:FINGERPRINT_BYTES])
    return tuple(kept)


def _link(secret: bytes, content: bytes) -> bytes:
    return hmac.digest(secret, content, hashlib.sha256)


def _sized(content: bytes) -> bytes:
    return len(content).to_bytes(4) + content


def _calls_of(turn: ChatTurn) -> bytes:
    """What a turn says beside its text; nothing for nearly all of them."""
    if not turn.tool_calls and not turn.tool_call_id:
        return b""
    return _sized(turn.tool_call_id.encode()) + b"".join(
        _sized(encode_body(call)) for call in turn.tool_calls
    )
