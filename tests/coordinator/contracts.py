"""Awarded jobs for the tests of what comes after the award."""

from __future__ import annotations

from market_town import DIGEST, PRICES, START, make_terms, signer_of

from pinaivu_node.coordinator.auction import RankedAward
from pinaivu_node.coordinator.config import DEFAULT_POLICY
from pinaivu_node.coordinator.job import Contract, Job, hold_for
from pinaivu_node.protocol.ids import digest_of
from pinaivu_node.protocol.market import Proof, SegmentOutcome
from pinaivu_node.protocol.signing import Signer

GATEWAY = signer_of("gateway")
WINNER, STANDBY, STRANGER = (signer_of(name) for name in ("winner", "standby", "stranger"))
TOKENS = {signer.peer_id: digest_of(signer.peer_id.encode()) for signer in (WINNER, STANDBY)}


def make_contract(*, uplift_ppm: int = 100_000, **changes) -> Contract:
    terms = make_terms(**changes)
    awards = tuple(
        RankedAward(
            provider=signer.peer_id,
            rank=rank,
            model_digest=DIGEST,
            prices=PRICES,
            uplift_ppm=uplift_ppm,
            pay=0,
            expected_cost=0,
            expected_time_ms=0,
            generalised_cost=0,
        )
        for rank, signer in enumerate((WINNER, STANDBY))
    )
    return Contract(
        terms=terms,
        gateway=GATEWAY.peer_id,
        policy=DEFAULT_POLICY,
        policy_hash=digest_of(b"policy"),
        awards=awards,
        tokens=TOKENS,
        bid_set_root=digest_of(b"root"),
        bids=2,
        passes=0,
        hold=hold_for(terms, DEFAULT_POLICY),
        opened_at=START,
        awarded_at=START + 10,
    )


def make_job(**changes) -> Job:
    return Job(make_contract(**changes))


def proof_of(signer: Signer, usage, **changes) -> Proof:
    proof = Proof(
        request_id=make_terms().request_id,
        provider=signer.peer_id,
        gateway=GATEWAY.peer_id,
        model_digest=DIGEST,
        usage=usage,
        output_hash=digest_of(b"proven"),
        token=TOKENS.get(signer.peer_id, digest_of(b"none")),
        outcome=SegmentOutcome.COMPLETED,
        engine_ttft_ms=1,
        duration_ms=2,
        voucher=None,
    )
    return proof.model_copy(update=changes)


def prove(job: Job, signer: Signer, usage, *, at: int = START + 100, **changes) -> bool:
    proof = proof_of(signer, usage, **changes)
    return job.add_proof_untrusted(proof, signer.seal(proof), sender=signer.peer_id, now=at)


def deliver(job: Job, delivery, *, signer: Signer = GATEWAY, at: int = START + 100) -> bool:
    return job.add_delivery_untrusted(
        delivery, signer.seal(delivery), sender=signer.peer_id, now=at
    )
