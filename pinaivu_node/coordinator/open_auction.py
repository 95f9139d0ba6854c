"""An auction while it runs: whose answers are in, whose are awaited, when it closes.

Pure, changed by one owner.  It closes as soon as everyone it waits for has answered; else a grace
after the bid that made enough; at the latest when its window ends.  It waits for every invited
provider that is not known to be full, and for the full ones too as long as nobody has bid: what
is known of their load is up to a heartbeat old.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pinaivu_node.coordinator.auction import Answer
from pinaivu_node.protocol.draw import draw
from pinaivu_node.protocol.errors import PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId, UnixMilliseconds
from pinaivu_node.protocol.market import (
    AnswerRecord,
    AuctionPolicy,
    AuctionRecord,
    Bid,
    JobRequest,
    Measurement,
    Pass,
)
from pinaivu_node.protocol.signing import Envelope

MAX_ANSWERS: Final = 768
MAX_ANSWER_BYTES: Final = 600
"""Twice what a bid takes.  Together: the whole bid set, lists included, fits one frame of a
mebibyte.  The policy asks for a few dozen answers."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """Whom an auction's offer lets answer."""

    threshold: int
    providers: frozenset[PeerId]
    """Live, announcing the model, and under the threshold."""
    full: frozenset[PeerId]
    """Those of them that are known to have no free slot."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What the coordinator knows of a bidder when the auction closes."""

    measurement: Measurement
    banned: bool
    full: bool


@dataclass(frozen=True, slots=True)
class ClosedAuction:
    """What will be published, and the same opened, as `decide` takes it."""

    record: AuctionRecord
    kept: tuple[AnswerRecord, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class _Received:
    message: Bid | Pass
    envelope: Envelope
    at: UnixMilliseconds


class OpenAuction:
    """The sealed answers to one offer."""

    def __init__(
        self,
        request: JobRequest,
        invitation: Invitation,
        *,
        policy: AuctionPolicy,
        opened_at: UnixMilliseconds,
    ) -> None:
        self.request: Final = request
        self.opened_at: Final = opened_at
        self.last_call: Final = UnixMilliseconds(opened_at + policy.window_ms)
        """The latest close."""
        self.threshold: Final = invitation.threshold
        self._policy = policy
        self._answers: dict[PeerId, _Received] = {}
        self._awaited = set(invitation.providers - invitation.full)
        self._awaited_if_nobody_bids = set(invitation.full)
        self._enough_at: UnixMilliseconds | None = None
        self.bids = 0

    @property
    def passes(self) -> int:
        """How many have declined."""
        return len(self._answers) - self.bids

    def add_answer_untrusted(
        self, message: Bid | Pass, envelope: Envelope, *, sender: PeerId, now: UnixMilliseconds
    ) -> None:
        """Take in one answer, whose signature by `sender` has been verified.

        Raises RemoteProtocolError: it speaks for another provider (banned: it signed that), it was
        not invited, or it is late, repeated or beyond the bound (ignored: honest peers can be).
        """
        if message.bidder != sender:
            raise RemoteProtocolError(
                f"{sender} answers in the name of {message.bidder}", action=PeerAction.BAN
            )
        if draw(sender, self.request.terms.request_id) >= self.threshold:
            raise RemoteProtocolError(f"{sender} was not invited to answer")
        if now > self.last_call:
            raise RemoteProtocolError("the auction has closed", action=PeerAction.IGNORE)
        if sender in self._answers:
            raise RemoteProtocolError("a second answer", action=PeerAction.IGNORE)
        if len(envelope.body) > MAX_ANSWER_BYTES:
            raise RemoteProtocolError(f"an answer of {len(envelope.body)} bytes")
        if len(self._answers) >= MAX_ANSWERS:
            raise RemoteProtocolError("the bid set is full", action=PeerAction.IGNORE)
        self._answers[sender] = _Received(message, envelope, now)
        self.forget(sender)
        if isinstance(message, Bid):
            self.bids += 1
            if self.bids == self._policy.enough_bids:
                self._enough_at = now

    def forget(self, provider: PeerId) -> None:
        """Stop waiting for a provider: it answered, or it left the network."""
        self._awaited.discard(provider)
        self._awaited_if_nobody_bids.discard(provider)

    def is_complete(self) -> bool:
        """Whether everyone that is waited for has answered."""
        return not self._awaited and (self.bids > 0 or not self._awaited_if_nobody_bids)

    def close_time(self) -> UnixMilliseconds:
        """When the auction ends if no further answer comes; the opening if it is complete."""
        if self.is_complete():
            return self.opened_at
        if self._enough_at is not None:
            return UnixMilliseconds(min(self.last_call, self._enough_at + self._policy.grace_ms))
        return self.last_call

    def close(
        self,
        *,
        coordinator: PeerId,
        gateway: PeerId,
        now: UnixMilliseconds,
        standing: Callable[[Bid | Pass], Standing],
    ) -> ClosedAuction:
        """Everything that decides the auction; nothing may be added afterwards."""
        record = AuctionRecord(
            coordinator=coordinator,
            gateway=gateway,
            terms=self.request.terms,
            allow=self.request.allow,
            deny=self.request.deny,
            policy=self._policy,
            opened_at=self.opened_at,
            closed_at=now,
        )
        received = [self._answers[peer] for peer in sorted(self._answers)]
        answers = tuple(_answer(each, standing(each.message)) for each in received)
        kept = (_kept(each, answer) for each, answer in zip(received, answers, strict=True))
        return ClosedAuction(record, tuple(kept), answers)


def _answer(received: _Received, standing: Standing) -> Answer:
    return Answer(
        message=received.message,
        received_at=received.at,
        measurement=standing.measurement,
        banned=standing.banned,
        full=standing.full,
    )


def _kept(received: _Received, answer: Answer) -> AnswerRecord:
    return AnswerRecord(
        answer=received.envelope,
        received_at=answer.received_at,
        measurement=answer.measurement,
        banned=answer.banned,
        full=answer.full,
    )
