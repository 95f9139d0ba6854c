"""Double entry: what moves between which accounts.  Pure; the store keeps the balances.

Every entry sums to zero and has a key under which it is posted once, so that doing it again after
a crash is harmless.  Only the treasury may go below zero: it is where money enters and leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NewType

from pinaivu_node.protocol.errors import LocalProtocolError
from pinaivu_node.protocol.ids import MAX_SAFE_INTEGER, NanoX, PeerId, RequestId

Account = NewType("Account", str)

FEE: Final = Account("fee")
TREASURY: Final = Account("treasury")


def gateway_account(peer: PeerId) -> Account:
    """What a gateway has paid in and not yet spent."""
    return Account(f"gateway:{peer}")


def provider_account(peer: PeerId) -> Account:
    """What a provider has earned."""
    return Account(f"provider:{peer}")


def hold_account(request_id: RequestId) -> Account:
    """What is set aside for one job."""
    return Account(f"hold:{request_id}")


@dataclass(frozen=True, slots=True)
class Posting:
    """An amount added to an account; negative: taken from it."""

    account: Account
    amount: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Postings that happen together or not at all."""

    key: str
    """Posting a key again changes nothing."""
    postings: tuple[Posting, ...]

    def __post_init__(self) -> None:
        """Raise LocalProtocolError for an entry that would lose or invent money: it is our bug."""
        if sum(posting.amount for posting in self.postings) != 0:
            raise LocalProtocolError(f"entry {self.key} does not sum to zero")
        if len({posting.account for posting in self.postings}) != len(self.postings):
            raise LocalProtocolError(f"entry {self.key} posts twice to one account")


class OverdraftError(Exception):
    """An account other than the treasury would go below zero; nothing was posted."""

    def __init__(self, account: Account, *, balance: int, needed: int) -> None:
        super().__init__(f"{account} has {balance} NanoX of the {needed} needed")
        self.account = account
        self.balance = balance
        self.needed = needed


def posted(balances: Mapping[Account, int], entry: Entry) -> dict[Account, int]:
    """The balances of the entry's accounts once it is posted; an unknown account has zero.

    Raises OverdraftError, and LocalProtocolError where a balance would leave the range that every
    reader of a receipt can represent.
    """
    after = {}
    for posting in entry.postings:
        before = balances.get(posting.account, 0)
        balance = before + posting.amount
        if balance < 0 and posting.amount < 0 and posting.account != TREASURY:
            raise OverdraftError(posting.account, balance=before, needed=-posting.amount)
        if abs(balance) > MAX_SAFE_INTEGER:
            raise LocalProtocolError(f"{posting.account} would pass 2⁵³−1 NanoX")
        after[posting.account] = balance
    return after


def deposit_entry(peer: PeerId, amount: NanoX, *, key: str) -> Entry:
    """Money paid in for a gateway, known outside by `key`."""
    return _move(f"deposit:{key}", TREASURY, gateway_account(peer), amount)


def welcome_entry(peer: PeerId, amount: NanoX) -> Entry:
    """What a new gateway is granted once; for test networks."""
    return _move(f"welcome:{peer}", TREASURY, gateway_account(peer), amount)


def hold_entry(gateway: PeerId, request_id: RequestId, amount: NanoX) -> Entry:
    """The worst case of a job, set aside."""
    source = gateway_account(gateway)
    return _move(f"hold:{request_id}", source, hold_account(request_id), amount)


@dataclass(frozen=True, slots=True)
class Share:
    """What a job earned one provider: `amount` was paid, of which the network keeps `fee`."""

    provider: PeerId
    amount: NanoX
    fee: NanoX


def settle_entry(
    gateway: PeerId, request_id: RequestId, *, hold: NanoX, shares: Iterable[Share]
) -> Entry:
    """Capture what was used of a hold, and release the rest to its gateway."""
    shares = tuple(shares)
    spent = sum(share.amount for share in shares)
    moves = [
        Posting(hold_account(request_id), -hold),
        Posting(gateway_account(gateway), hold - spent),
        Posting(FEE, sum(share.fee for share in shares)),
        *(Posting(provider_account(each.provider), each.amount - each.fee) for each in shares),
    ]
    if spent > hold:
        raise LocalProtocolError(f"the bill of {request_id} is above its hold")
    return Entry(f"settle:{request_id}", tuple(move for move in moves if move.amount))


def _move(key: str, source: Account, target: Account, amount: NanoX) -> Entry:
    postings = (Posting(source, -amount), Posting(target, amount)) if amount else ()
    return Entry(key, postings)
