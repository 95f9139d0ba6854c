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

from pinaivu_node.protocol.inference import ChatTurn
from pinaivu_node.protocol.market import MAX_FINGERPRINTS

FINGERPRINT_BYTES: Final = 16
"""Of 32: two of a billion prefixes meet by chance with a probability of 10⁻²¹."""


def fingerprint_chain(secret: bytes, turns: Sequence[ChatTurn]) -> tuple[bytes, ...]:
    """The fingerprint of the conversation after each turn; of a very long one, the newest.

    The chain runs over whole digests, and only what leaves us is cut short.
    """
    kept: deque[bytes] = deque(maxlen=MAX_FINGERPRINTS)
    digest = b""
    for turn in turns:
        role, content = turn.role.encode(), turn.content.encode()
        # The lengths keep `ab` + `c` apart from `a` + `bc`.
        head = digest + len(role).to_bytes(4) + role + len(content).to_bytes(4)
        digest = hmac.digest(secret, head + content, hashlib.sha256)
        kept.append(digest[:FINGERPRINT_BYTES])
    return tuple(kept)
