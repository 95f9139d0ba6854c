"""Orders, awards and dispatch tokens as an honest coordinator makes them, one change at a time."""

from __future__ import annotations

from typing import Any

from pinaivu_gateway.awards import Assignment, job_request
from pinaivu_gateway.jobs import JobOrder
from pinaivu_node.protocol.ids import (
    ModelName,
    PeerId,
    UnixMilliseconds,
    digest_of,
    request_id_of,
)
from pinaivu_node.protocol.inference import ChatTurn, Prompt, Sampling
from pinaivu_node.protocol.market import Award, Contact, DispatchToken, JobKind, JobRequest
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.protocol.signing import Envelope, Signer

COORDINATOR = Signer(b"c" * 32)
GATEWAY = Signer(b"g" * 32)
PROVIDERS = (Signer(b"p" * 32), Signer(b"q" * 32), Signer(b"r" * 32))
STRANGER = Signer(b"x" * 32)
NOW = UnixMilliseconds(1_800_000_000_000)
TTL = 10_000
OUTPUT_LIMIT = 300
PRICES = PriceList(input=50_000_000, cached_input=10_000_000, output=200_000_000)


def order(**changes: Any) -> JobOrder:
    fields: dict[str, Any] = {
        "request_id": request_id_of(bytes(16)),
        "kind": JobKind.CHAT,
        "model": ModelName("smollm2:135m"),
        "prompt": Prompt(nonce=bytes(16), turns=(ChatTurn(role="user", content="hi"),)),
        "sampling": Sampling(max_tokens=OUTPUT_LIMIT, seed=7),
        "input_limit": 200,
        "input_estimate": 20,
        "output_limit": OUTPUT_LIMIT,
        "output_estimate": 100,
        "deadline_in": 60_000,
    }
    return JobOrder(**{**fields, **changes})


def request(**changes: Any) -> JobRequest:
    return job_request(order(**changes), now=NOW)


def token(rank: int = 0, *, of: JobRequest | None = None, **changes: Any) -> DispatchToken:
    terms = (of or request()).terms
    fields: dict[str, Any] = {
        "request_id": terms.request_id,
        "provider": PROVIDERS[rank].peer_id,
        "gateway": GATEWAY.peer_id,
        "kind_of_job": terms.kind,
        "model": terms.model,
        "model_digest": digest_of(b"weights"),
        "rank": rank,
        "input_limit": terms.input_limit,
        "output_limit": terms.output_limit,
        "prices": PRICES,
        "uplift_ppm": 0,
        "sampling_digest": terms.sampling_digest,
        "input_commitment": terms.input_commitment,
        "bid_set_root": digest_of(b"bids"),
        "policy_hash": digest_of(b"policy"),
        "issued_at": NOW,
        "expires_at": NOW + TTL,
        "deadline": terms.deadline,
    }
    return DispatchToken(**{**fields, **changes})


def address(peer: PeerId) -> str:
    return f"/ip4/127.0.0.1/tcp/4001/p2p/{peer}"


def award(*tokens: DispatchToken | Envelope) -> Award:
    envelopes = [each if isinstance(each, Envelope) else COORDINATOR.seal(each) for each in tokens]
    return Award(
        request_id=request().terms.request_id,
        tokens=tuple(envelopes),
        contacts=tuple(
            Contact(peer=each.peer_id, addresses=(address(each.peer_id),)) for each in PROVIDERS
        ),
        bids=3,
        passes=0,
        auction_ms=5,
    )


def assignment(rank: int = 0, **changes: Any) -> Assignment:
    signed = token(rank, **changes)
    return Assignment(signed, COORDINATOR.seal(signed), (address(signed.provider),))
