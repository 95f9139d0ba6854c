"""Every number that the coordinator goes by, frozen."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, Field, field_validator

from pinaivu_node.protocol.ids import MILLION, Milliseconds, NanoX, PartsPerMillion
from pinaivu_node.protocol.market import AuctionPolicy
from pinaivu_node.protocol.money import PriceList

DEFAULT_POLICY: Final = AuctionPolicy(
    # Gossip across continents takes about 300 ms; nearly every auction closes earlier, complete.
    window_ms=Milliseconds(400),
    # A provider that was reached as fast as the others answers within the spread of its peers.
    grace_ms=Milliseconds(30),
    enough_bids=8,
    # Price and speed hardly improve with the twentieth bid; the load on everyone does.
    bid_target=16,
    standbys=2,
    # 0.4, 0.1 and 1.6 X per million tokens: eight times what small open models are offered for.
    price_ceiling=PriceList(
        input=NanoX(400_000_000), cached_input=NanoX(100_000_000), output=NanoX(1_600_000_000)
    ),
    # At 5 NanoX per ms a second is worth about 25 output tokens of 200 NanoX; at 50, 250 of them.
    time_value_price=NanoX(0),
    time_value_balanced=NanoX(5),
    time_value_latency=NanoX(50),
    # A slow CPU: a newcomer that is better shows it in its first jobs.
    prior_ttft_ms=Milliseconds(400),
    prior_millitokens_per_second=20_000,
    prior_reliability_ppm=PartsPerMillion(900_000),
    prior_weight=4,
    fee_ppm=PartsPerMillion(20_000),
    # A gateway dispatches within milliseconds, and dials within seconds.
    token_ttl_ms=Milliseconds(10_000),
)


class CoordinatorConfig(BaseModel, frozen=True, extra="forbid"):
    """What `serve_coordinator` is handed."""

    policy: AuctionPolicy = DEFAULT_POLICY
    heartbeat_ms: Annotated[int, Field(ge=50, le=60_000)] = 1000
    settlement_grace_ms: Annotated[int, Field(ge=0, le=600_000)] = 10_000
    """How long the second of Proof and Delivery may take: a reconnection with its backoff."""
    longest_job_ms: Annotated[int, Field(ge=1000, le=86_400_000)] = 3_600_000
    """No deadline may be further off: a hold is not tied up for longer than this."""
    welcome_credit: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    """NanoX granted once to every new gateway; for test networks."""
    max_auctions: Annotated[int, Field(ge=1, le=100_000)] = 512
    """At once; about 100 kB each.  At 10 ms each that is 50,000 a second."""
    max_open_jobs: Annotated[int, Field(ge=1, le=1_000_000)] = 2048
    """Per gateway, auctions included: one gateway cannot fill the coordinator's memory."""
    messages_per_second: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """Per peer; what comes faster is read later.  Each costs up to 0.5 ms with its look into the
    books, so that one peer can take a quarter of a core and no more."""
    log_requests_per_second: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    """Per peer, on the log protocol; what comes faster is answered later."""
    roster_interval_ms: Annotated[int, Field(ge=1, le=60_000)] = 50
    """Changes of the roster within it are told together."""
    hello_timeout_ms: Annotated[int, Field(ge=100, le=60_000)] = 10_000
    """How long an open stream may say nothing before its Hello."""

    @field_validator("policy")
    @classmethod
    def _fee_is_a_share(cls, policy: AuctionPolicy) -> AuctionPolicy:
        if policy.fee_ppm > MILLION:
            raise ValueError("the fee is a share of the bill: at most 1,000,000 ppm")
        return policy
