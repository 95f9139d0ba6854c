"""Who may answer an offer: a draw that everyone can repeat and nobody can choose.

At scale an offer would call up thousands of bids for one winner.  So each provider draws a number
from its own name and the request's, and only those below the offer's threshold may answer.
"""

from __future__ import annotations

import hashlib
from typing import Final

from pinaivu_node.protocol.ids import PeerId, RequestId

EVERYONE: Final = 2**32
"""The threshold that lets all providers through: a draw is always below it."""


def draw(peer: PeerId, request_id: RequestId) -> int:
    """This provider's number for this request, uniform below 2³²."""
    return int.from_bytes(hashlib.sha256(f"{peer}{request_id}".encode()).digest()[:4])


def threshold_for(*, bid_target: int, live: int) -> int:
    """The threshold under which about `bid_target` of `live` providers fall."""
    return EVERYONE if live <= bid_target else EVERYONE * bid_target // live
