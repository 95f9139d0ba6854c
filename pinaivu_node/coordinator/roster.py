"""Who is in the market now: roles, addresses, models, load.  Pure.

A provider counts as full by two kinds of knowledge: what it last reported, which is up to a
heartbeat old, and the places the coordinator has given away since, which nobody else knows.

When a peer was heard is told by a clock that is never set; when a place falls back, by the one on
the wall, which also dates the dispatch tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import Milliseconds, ModelName, PeerId, RequestId, UnixMilliseconds
from pinaivu_node.protocol.market import (
    MAX_PEER_LIST,
    Announce,
    Contact,
    Heartbeat,
    Hello,
    ModelOffer,
    Role,
    Roster,
    RosterEntry,
)
from pinaivu_node.protocol.wire import encode_body

MISSED_HEARTBEATS: Final = 3
_MAX_ROSTER_BYTES: Final = 1_000_000
"""A roster is one frame; peers beyond it are left out and counted, never a broken frame."""


@dataclass(slots=True)
class _Sale:
    """One model of one provider, and who occupies it."""

    offer: ModelOffer
    reported: int = 0
    reserved: dict[RequestId, UnixMilliseconds] = field(default_factory=dict)
    """Places given away, each until its dispatch token can no longer be used."""

    def load(self, now: UnixMilliseconds) -> int:
        return max(self.reported, self.given_away(now))

    def given_away(self, now: UnixMilliseconds) -> int:
        for request_id in [each for each, until in self.reserved.items() if until <= now]:
            del self.reserved[request_id]
        return len(self.reserved)


@dataclass(slots=True)
class _Member:
    peer: PeerId
    role: Role
    addresses: tuple[str, ...]
    heard_at: Milliseconds
    sales: dict[ModelName, _Sale] = field(default_factory=dict)
    draining: bool = False

    def entry(self) -> RosterEntry:
        offers = () if self.draining else tuple(sale.offer for sale in self.sales.values())
        return RosterEntry(peer=self.peer, role=self.role, addresses=self.addresses, models=offers)


class Market:
    """Everyone who said Hello and has been heard of since."""

    def __init__(self) -> None:
        self._members: dict[PeerId, _Member] = {}
        self._sellers: dict[ModelName, set[PeerId]] = {}
        self.left_out = 0
        """Entries that did not fit the last roster."""

    def enter(self, peer: PeerId, hello: Hello, *, now: Milliseconds) -> None:
        """A peer is there, with nothing announced yet; RemoteProtocolError if it changes role."""
        known = self._members.get(peer)
        if known is not None and known.role != hello.role:
            raise RemoteProtocolError(f"a {known.role} says Hello as a {hello.role}")
        self.leave(peer)
        self._members[peer] = _Member(peer, hello.role, hello.addresses, now)

    def leave(self, peer: PeerId) -> bool:
        """Forget a peer; whether it was known."""
        member = self._members.pop(peer, None)
        if member is None:
            return False
        self._unlist(member)
        return True

    def announce_untrusted(self, peer: PeerId, announce: Announce) -> None:
        """Replace what a provider sells, keeping what is known of its load."""
        member = self._provider_untrusted(peer)
        if len({offer.model for offer in announce.models}) != len(announce.models):
            raise RemoteProtocolError("a model is announced twice")
        self._unlist(member)
        old = member.sales
        member.sales = {}
        for offer in announce.models:
            sale = old.get(offer.model, _Sale(offer))
            sale.offer = offer
            member.sales[offer.model] = sale
            self._sellers.setdefault(offer.model, set()).add(peer)
        member.draining = announce.draining

    def drain_untrusted(self, peer: PeerId, *, draining: bool) -> None:
        """A provider takes no more jobs, or takes them again."""
        self._provider_untrusted(peer).draining = draining

    def hear(self, peer: PeerId, now: Milliseconds) -> None:
        """Something came from this peer: it lives."""
        member = self._members.get(peer)
        if member is not None:
            member.heard_at = now

    def report_load(self, peer: PeerId, heartbeat: Heartbeat) -> None:
        """Take over the loads that a provider counts itself."""
        member = self._members.get(peer)
        if member is None:
            return
        for load in heartbeat.loads:
            sale = member.sales.get(load.model)
            if sale is not None:
                sale.reported = load.running + load.queued

    def reserve(
        self, peer: PeerId, model: ModelName, request_id: RequestId, until: UnixMilliseconds
    ) -> None:
        """A place has been given away."""
        sale = self._sale(peer, model)
        if sale is not None:
            sale.reserved[request_id] = until

    def release(self, peer: PeerId, model: ModelName, request_id: RequestId, *, ran: bool) -> None:
        """A job is over; `ran` says that the provider itself has reported its end."""
        sale = self._sale(peer, model)
        if sale is None:
            return
        sale.reserved.pop(request_id, None)
        if ran:
            sale.reported = max(0, sale.reported - 1)

    def silent(self, *, now: Milliseconds, heartbeat_ms: int) -> list[PeerId]:
        """Who has missed three heartbeats; they are to be made to leave."""
        limit = now - MISSED_HEARTBEATS * heartbeat_ms
        return [peer for peer, member in self._members.items() if member.heard_at < limit]

    def sellers(self, model: ModelName) -> dict[PeerId, ModelOffer]:
        """Live providers of a model that take jobs, and what each offers."""
        members = (self._members[peer] for peer in self._sellers.get(model, ()))
        return {each.peer: each.sales[model].offer for each in members if not each.draining}

    def sells(self, peer: PeerId, model: ModelName) -> bool:
        """Whether this peer is live and announces the model."""
        return peer in self._sellers.get(model, ())

    def offer(self, peer: PeerId, model: ModelName) -> ModelOffer | None:
        """What a peer announces of a model now."""
        sale = self._sale(peer, model)
        return sale.offer if sale else None

    def is_announced(self, model: ModelName) -> bool:
        """Whether anybody live serves the model, draining or not."""
        return bool(self._sellers.get(model))

    def is_known_full(self, peer: PeerId, model: ModelName, now: UnixMilliseconds) -> bool:
        """Whether the last that is known leaves no free place; it may have become free since."""
        sale = self._sale(peer, model)
        return sale is None or sale.load(now) >= sale.offer.capacity

    def is_given_away(self, peer: PeerId, model: ModelName, now: UnixMilliseconds) -> bool:
        """Whether every place was awarded and not yet released: a bid made meanwhile is void."""
        sale = self._sale(peer, model)
        return sale is None or sale.given_away(now) >= sale.offer.capacity

    def contact(self, peer: PeerId) -> Contact:
        """Where to dial a peer; no addresses if it has just left."""
        member = self._members.get(peer)
        return Contact(peer=peer, addresses=member.addresses if member else ())

    def role_of(self, peer: PeerId) -> Role | None:
        """What a peer is, if it is there."""
        member = self._members.get(peer)
        return member.role if member else None

    def counts(self) -> Mapping[Role, int]:
        """How many of each role are there."""
        roles = [member.role for member in self._members.values()]
        return {role: roles.count(role) for role in Role}

    def roster_for(self, reader: Role) -> Roster:
        """Gateways are told of providers, providers of gateways."""
        other = Role.PROVIDER if reader is Role.GATEWAY else Role.GATEWAY
        entries = [member.entry() for member in self._members.values() if member.role is other]
        kept = list(_within_a_frame(entries))
        self.left_out = len(entries) - len(kept)
        return Roster(entries=tuple(kept))

    def _sale(self, peer: PeerId, model: ModelName) -> _Sale | None:
        member = self._members.get(peer)
        return member.sales.get(model) if member else None

    def _provider_untrusted(self, peer: PeerId) -> _Member:
        member = self._members.get(peer)
        if member is None or member.role is not Role.PROVIDER:
            raise RemoteProtocolError("only a provider may say that")
        return member

    def _unlist(self, member: _Member) -> None:
        for model in member.sales:
            sellers = self._sellers[model]
            sellers.discard(member.peer)
            if not sellers:
                del self._sellers[model]


def _within_a_frame(entries: Iterable[RosterEntry]) -> Iterable[RosterEntry]:
    size = 0
    for number, entry in enumerate(entries):
        size += len(encode_body(entry))
        if number >= MAX_PEER_LIST or size > _MAX_ROSTER_BYTES:
            return
        yield entry
