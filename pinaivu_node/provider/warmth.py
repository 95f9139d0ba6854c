"""Which beginnings of prompts an engine still has, by the fingerprints that offers carry.

Pure.  A job that was served teaches one fact: the last fingerprint of its chain stands for all of
its prompt's tokens.  The next turn of that conversation brings the same fingerprint in the middle
of a longer chain, and those tokens need not be computed again, if the engine still has them.

Of what many conversations begin with, a long system prompt mostly, the length is never told.  But
when a second conversation begins like a first one, what the engine then has of its prompt is what
the two have in common; the least that was ever found so is taken for the length.

Whoever claims too much is paid as if it had been true, so the memory errs on the low side: it
counts whole blocks only and leaves one out, it takes the engine's word for how long a prefix is
kept, and it forgets everything when the engine was restarted.  What the engine really had, when
the job came, corrects it.

Fingerprints are the gateways' word.  One that lets the same fingerprint stand for different
prompts would be charged as for warm ones and served cold; so facts are kept per gateway, and one
whose claims come to nothing gets no more of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

from pinaivu_node.engine.types import EngineStatistics, TokenEvent
from pinaivu_node.protocol.ids import PeerId, RequestId

BLOCK: Final = 64
"""Tokens of the smallest unit that engines cache; larger ones are noticed."""
LARGEST_BLOCK: Final = 1024
CAPACITY: Final = 16_384
"""Prompts remembered per model, 5 MB: more than the KV cache of any box holds."""
ACCOUNTS: Final = 1024
"""Gateways whose claims are kept account of."""
ALLOWANCE: Final = 4096
"""Tokens that a gateway's claims may fall short of before it gets no more: one long prompt."""
LOSS_SHARE: Final = 8
"""And beside it one token for so many that were found as claimed."""
CLAIMS: Final = 16_384
"""Bids whose job may still come: those of ten seconds of a busy network."""
BEGINNINGS: Final = 4
"""Turns at the start of a conversation that others may begin with: a system prompt and examples."""
ACCOUNT_S: Final = 3600.0
"""After which an account is opened anew: what went wrong may have been ours."""

Mark = tuple[bytes, int]
"""A fingerprint, and how many tokens the prompt up to there has, exactly."""

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Chain:
    """A conversation, as its gateway names it: one fingerprint for its beginning up to each turn.

    Two gateways that say the same fingerprint mean two things.
    """

    gateway: PeerId
    fingerprints: Sequence[bytes]


def marks_of(chain: Chain, *, prompt_tokens: int) -> tuple[Mark, ...]:
    """What a prompt of this length teaches of its chain.

    Only the whole prompt's length is known.  An engine that says where each message ends would
    teach a mark for each of them, and then a shared beginning is known from its first use.
    """
    return ((chain.fingerprints[-1], prompt_tokens),) if chain.fingerprints else ()


@dataclass(slots=True)
class _Known:
    """What a fingerprint stands for: a length that is known, or the least that was ever found."""

    tokens: int
    used_at: float
    is_exact: bool

    def whole_blocks(self, block: int) -> int:
        if not self.is_exact:
            return self.tokens  # it was found in whole blocks
        return max(0, self.tokens // block - 1) * block

    def note_found(self, tokens: int) -> None:
        if not self.is_exact and tokens:
            self.tokens = min(tokens, self.tokens or tokens)


class _Claim(NamedTuple):
    tokens: int
    is_exact: bool
    """Made from a length that was known, so that only the size of blocks can make it fall short."""


@dataclass(slots=True)
class _Account:
    """What the claims to one gateway have come to, in tokens."""

    opened_at: float
    found: int = 0
    missing: int = 0

    def is_good(self, now: float) -> bool:
        return self.is_over(now) or self.missing <= ALLOWANCE + self.found // LOSS_SHARE

    def is_over(self, now: float) -> bool:
        return now - self.opened_at >= ACCOUNT_S


_NOTHING: Final = _Claim(0, is_exact=False)


class Warmth:
    """What one engine has warm; owned by whoever bids for it.  Times are seconds of one clock."""

    def __init__(self, *, notice_s: float, capacity: int = CAPACITY) -> None:
        """`notice_s`: how long after a bid its job may still come."""
        self._notice_s: Final = notice_s
        self._capacity: Final = capacity
        self._known: OrderedDict[tuple[PeerId, bytes], _Known] = OrderedDict()
        self._claims: OrderedDict[str, _Claim] = OrderedDict()
        self._accounts: OrderedDict[PeerId, _Account] = OrderedDict()
        self._block = BLOCK
        self._restarts: int | None = None

    def __len__(self) -> int:
        return len(self._known)

    def warm_tokens(
        self, request_id: RequestId, chain: Chain, engine: EngineStatistics, *, now: float
    ) -> int:
        """Prompt tokens of this chain that need not be computed, should its job come.

        They are taken for claimed; of a job that does not come, the claim is forgotten in time.
        """
        claim = self._claim(chain, engine, now=now)
        if claim.tokens:
            _put(self._claims, request_id, claim, capacity=CLAIMS)
        return claim.tokens

    def _claim(self, chain: Chain, engine: EngineStatistics, *, now: float) -> _Claim:
        self._notice_restart(engine)
        account = self._accounts.get(chain.gateway)
        if account is not None and not account.is_good(now):
            return _NOTHING
        for known in self._known_of(chain, chain.fingerprints):
            if now + self._notice_s - known.used_at <= engine.prefix_horizon_s:
                return _Claim(known.whole_blocks(self._block), known.is_exact)
        return _NOTHING

    def computed(
        self, chain: Chain, event: TokenEvent, engine: EngineStatistics, *, resumed: int, now: float
    ) -> None:
        """The engine has read a job's prompt: learn from it, and hold what was claimed against it.

        `resumed`: tokens of the answer that another provider gave, read with the prompt.
        """
        self._notice_restart(engine)
        for known in self._known_of(chain, chain.fingerprints[:-1]):
            known.note_found(event.cached_tokens)
            break
        self._settle(chain, self._claims.pop(event.request_id, None), event, now=now)
        self.used(chain, now=now)
        if engine.prefix_horizon_s > 0:
            self._learn(chain, max(0, event.input_tokens - resumed), now=now)

    def used(self, chain: Chain, *, now: float) -> None:
        """The engine works on this chain, or did until now: none of it is old."""
        for fingerprint in chain.fingerprints:
            known = self._known.get((chain.gateway, fingerprint))
            if known is not None:
                known.used_at = now
                self._known.move_to_end((chain.gateway, fingerprint))

    def _known_of(self, chain: Chain, fingerprints: Sequence[bytes]) -> Iterator[_Known]:
        """What is known of these members of the chain, the longest first."""
        for fingerprint in reversed(fingerprints):
            known = self._known.get((chain.gateway, fingerprint))
            if known is not None:
                yield known

    def _learn(self, chain: Chain, prompt_tokens: int, *, now: float) -> None:
        for fingerprint in chain.fingerprints[: min(BEGINNINGS, len(chain.fingerprints) - 1)]:
            if (chain.gateway, fingerprint) not in self._known:
                self._keep(chain, fingerprint, _Known(0, used_at=now, is_exact=False))
        for fingerprint, tokens in marks_of(chain, prompt_tokens=prompt_tokens):
            self._keep(chain, fingerprint, _Known(tokens, used_at=now, is_exact=True))

    def _keep(self, chain: Chain, fingerprint: bytes, known: _Known) -> None:
        _put(self._known, (chain.gateway, fingerprint), known, capacity=self._capacity)

    def _settle(self, chain: Chain, claim: _Claim | None, event: TokenEvent, *, now: float) -> None:
        if claim is None:
            return
        found = min(claim.tokens, event.cached_tokens)
        account = self._accounts.get(chain.gateway)
        if account is None or account.is_over(now):
            account = _Account(opened_at=now)
        _put(self._accounts, chain.gateway, account, capacity=ACCOUNTS)
        account.found += found
        account.missing += claim.tokens - found
        if found == 0:
            self._forget(chain)
        elif found < claim.tokens and claim.is_exact:
            # The prefix is there, and fewer whole blocks of it than there would be of our size.
            self._block = min(2 * self._block, LARGEST_BLOCK)

    def _forget(self, chain: Chain) -> None:
        for fingerprint in chain.fingerprints:
            self._known.pop((chain.gateway, fingerprint), None)

    def _notice_restart(self, engine: EngineStatistics) -> None:
        """A new engine has nothing of the old one's, and no gateway is to blame for that."""
        if engine.restarts != self._restarts:
            self._restarts = engine.restarts
            self._known.clear()
            self._claims.clear()


def _put(kept: OrderedDict[K, V], key: K, value: V, *, capacity: int) -> None:
    """Keep this as the newest, and no more than `capacity`."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > capacity:
        kept.popitem(last=False)
