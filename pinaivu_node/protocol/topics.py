"""Stream protocols and gossip topics: who meets whom where."""

from __future__ import annotations

from typing import Final

from pinaivu_node.protocol.ids import ModelName, Topic

MARKET: Final = "/pinaivu/market/1"
"""Everyone with the coordinator: presence, jobs, bids, awards, proofs, receipts."""
INFERENCE: Final = "/pinaivu/infer/1"
"""Gateway with provider: prompts and tokens.  The coordinator never opens it."""
LOG: Final = "/pinaivu/log/1"
"""Anyone with the coordinator: receipts and bid sets after the close."""
RELAY: Final = "/pinaivu/relay/1"
"""Anyone with a relay: to reach a peer that cannot be dialled, or to be reached."""

HEADS: Final = Topic("/pinaivu/heads/1")
"""Signed tree heads, to everyone."""


def jobs_topic(model: ModelName) -> Topic:
    """Where the coordinator offers the jobs of one model to its providers."""
    return Topic(f"/pinaivu/jobs/1/{model}")
