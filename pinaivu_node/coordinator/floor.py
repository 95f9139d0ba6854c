"""What the coordinator's parts share: each thing has its own module and its own rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pinaivu_node.coordinator.config import CoordinatorConfig
from pinaivu_node.coordinator.reputation import Reputation
from pinaivu_node.coordinator.roster import Market
from pinaivu_node.coordinator.sessions import Sessions
from pinaivu_node.coordinator.store import Store
from pinaivu_node.coordinator.tally import Tally
from pinaivu_node.protocol.ids import Digest, PeerId, UnixMilliseconds, digest_of
from pinaivu_node.protocol.signing import Signer
from pinaivu_node.protocol.wire import encode_body


@dataclass(frozen=True, slots=True)
class Floor:
    """The market floor: who is here, what is known of them, the books, the clock on the wall."""

    store: Store
    signer: Signer
    config: CoordinatorConfig
    clock: Callable[[], UnixMilliseconds]
    policy_hash: Digest
    reputation: Reputation
    market: Market = field(default_factory=Market)
    sessions: Sessions = field(default_factory=Sessions)
    tally: Tally = field(default_factory=Tally)
    banned: dict[PeerId, UnixMilliseconds] = field(default_factory=dict)
    """Until when each is banned."""


def open_floor(
    store: Store,
    signer: Signer,
    config: CoordinatorConfig,
    *,
    clock: Callable[[], UnixMilliseconds],
) -> Floor:
    """A floor with nobody on it yet."""
    return Floor(
        store=store,
        signer=signer,
        config=config,
        clock=clock,
        policy_hash=digest_of(encode_body(config.policy)),
        reputation=Reputation(config.policy),
    )
