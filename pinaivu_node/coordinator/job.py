"""One job from its request to its receipt.  Pure.

Two rules: an event that the table does not list for a state raises and changes nothing; and a job
is settled once, from what is known at that moment, and never reopened.

    OPEN ──award──▶ AWARDED ──proof──▶ PROVEN ──delivery──▶ DELIVERED ──settle──▶ SETTLED
      └──refuse──▶ REFUSED    └────────delivery──────────────▲
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeVar

from pinaivu_node.coordinator.auction import RankedAward, ceiling_of
from pinaivu_node.protocol.errors import LocalProtocolError, PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import (
    Digest,
    NanoX,
    PeerId,
    RequestId,
    UnixMilliseconds,
)
from pinaivu_node.protocol.market import AuctionPolicy, Delivery, JobTerms, Proof
from pinaivu_node.protocol.money import PriceList, TokenUsage, cost
from pinaivu_node.protocol.signing import Envelope
from pinaivu_node.protocol.wire import Message

M = TypeVar("M", bound=Message)


class JobState(Enum):
    """How far a job has come."""

    OPEN = "open"
    AWARDED = "awarded"
    PROVEN = "proven"
    DELIVERED = "delivered"
    SETTLED = "settled"
    REFUSED = "refused"


class JobEvent(Enum):
    """What happens to a job."""

    AWARD = "award"
    REFUSE = "refuse"
    PROOF = "proof"
    DELIVERY = "delivery"
    SETTLE = "settle"


TRANSITIONS: Final[Mapping[JobState, Mapping[JobEvent, JobState]]] = {
    JobState.OPEN: {JobEvent.AWARD: JobState.AWARDED, JobEvent.REFUSE: JobState.REFUSED},
    JobState.AWARDED: {
        JobEvent.PROOF: JobState.PROVEN,
        JobEvent.DELIVERY: JobState.DELIVERED,
        JobEvent.SETTLE: JobState.SETTLED,
    },
    JobState.PROVEN: {
        JobEvent.PROOF: JobState.PROVEN,  # a resumed job has one per provider
        JobEvent.DELIVERY: JobState.DELIVERED,
        JobEvent.SETTLE: JobState.SETTLED,
    },
    JobState.DELIVERED: {
        JobEvent.PROOF: JobState.DELIVERED,
        JobEvent.SETTLE: JobState.SETTLED,
    },
    JobState.SETTLED: {},
    JobState.REFUSED: {},
}


def after(state: JobState, event: JobEvent) -> JobState:
    """The state that an event leads to; LocalProtocolError if it may not happen there."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise LocalProtocolError(f"a job that is {state.value} cannot {event.value}") from None


@dataclass(frozen=True, slots=True)
class Contract:
    """What was awarded: everything that a bill depends on besides what was then done."""

    terms: JobTerms
    gateway: PeerId
    policy: AuctionPolicy
    policy_hash: Digest
    awards: tuple[RankedAward, ...]
    tokens: Mapping[PeerId, Digest]
    """The digest of each dispatch token, by the provider that it lets run the job."""
    bid_set_root: Digest
    bids: int
    passes: int
    hold: NanoX
    opened_at: UnixMilliseconds
    awarded_at: UnixMilliseconds
    incarnation: bytes = b""
    """The life of the gateway that bought it; empty if not known any more."""

    def award_of(self, provider: PeerId) -> RankedAward | None:
        """The place of this provider, if it was given a token."""
        return next((award for award in self.awards if award.provider == provider), None)


def hold_for(terms: JobTerms, policy: AuctionPolicy) -> NanoX:
    """The most a job can cost: every limit reached, at the ceiling, nothing found warm.

    Where the ceiling for cached input is above that for input, the dearer one counts.
    """
    ceiling = ceiling_of(terms, policy)
    dearest = max(ceiling.input, ceiling.cached_input)
    prices = PriceList(input=dearest, cached_input=dearest, output=ceiling.output)
    return cost(
        TokenUsage(input=terms.input_limit, cached_input=0, output=terms.output_limit), prices
    )


@dataclass(frozen=True, slots=True)
class Signed(Generic[M]):
    """What was said, and the proof that it was."""

    message: M
    envelope: Envelope


class Job:
    """An awarded job and what has been heard of it; one owner."""

    def __init__(self, contract: Contract) -> None:
        self.contract: Final = contract
        self.state = after(JobState.OPEN, JobEvent.AWARD)
        self.proofs: dict[PeerId, Signed[Proof]] = {}
        self.delivery: Signed[Delivery] | None = None
        self._heard_at = contract.awarded_at

    @property
    def request_id(self) -> RequestId:
        """Its name."""
        return self.contract.terms.request_id

    def add_proof_untrusted(
        self, proof: Proof, envelope: Envelope, *, sender: PeerId, now: UnixMilliseconds
    ) -> bool:
        """Take in a proof whose signature by `sender` was verified; False if one was known.

        Raises RemoteProtocolError (ignored: it may be a leftover of another life) if it does not
        belong to the token that this provider was given.
        """
        award = self.contract.award_of(sender)
        expected = (sender, self.contract.gateway, self.contract.tokens.get(sender))
        if award is None or (proof.provider, proof.gateway, proof.token) != expected:
            raise _irrelevant("the proof is not for a token that its sender was given")
        if proof.model_digest != award.model_digest:
            raise _irrelevant("the proof names another model than the token")
        if sender in self.proofs:
            return False
        self.state = after(self.state, JobEvent.PROOF)
        self.proofs[sender] = Signed(proof, envelope)
        self._heard_at = now
        return True

    def add_delivery_untrusted(
        self, delivery: Delivery, envelope: Envelope, *, sender: PeerId, now: UnixMilliseconds
    ) -> bool:
        """Take in a delivery whose signature by `sender` was verified; False if one was known.

        Raises RemoteProtocolError (ignored) if it is not this job's gateway that speaks, or if it
        reports one provider twice: a token is good for one dispatch.
        """
        if sender != self.contract.gateway or delivery.gateway != sender:
            raise _irrelevant("the delivery is not by the gateway of this job")
        if len({report.provider for report in delivery.segments}) != len(delivery.segments):
            raise _irrelevant("the delivery reports one provider twice")
        if self.delivery is not None:
            return False
        self.state = after(self.state, JobEvent.DELIVERY)
        self.delivery = Signed(delivery, envelope)
        self._heard_at = now
        return True

    def settle(self) -> None:
        """The receipt is being written."""
        self.state = after(self.state, JobEvent.SETTLE)

    def is_matched(self) -> bool:
        """Whether nothing more can change the bill: all that delivered something have proven it."""
        return self.delivery is not None and all(
            report.provider in self.proofs
            for report in self.delivery.message.segments
            if report.usage.output and self.contract.award_of(report.provider)
        )

    def settle_at(self, *, grace_ms: int, gateway_is_here: bool) -> UnixMilliseconds:
        """When to settle with what is known, if nothing else comes.

        A proof alone does not end the wait while the gateway is here: it may be going on with a
        standby, or with a client that reads slowly, and would be billed for vouchers alone.
        """
        if self.is_matched():
            return self._heard_at
        over = self.contract.terms.deadline
        heard = self.delivery is not None or (bool(self.proofs) and not gateway_is_here)
        return UnixMilliseconds((min(over, self._heard_at) if heard else over) + grace_ms)


def _irrelevant(explanation: str) -> RemoteProtocolError:
    return RemoteProtocolError(explanation, action=PeerAction.IGNORE)
