"""Which beginnings of prompts an engine still has, by the fingerprints that offers carry.

Pure.  A job that was served teaches one fact: the last fingerprint of its chain stands for all of
its prompt's tokens.  The next turn of that conversation brings the same fingerprint in the middle
of a longer chain, and those tokens need not be computed again, if the engine still has them.

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

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
    tokens: int
    used_at: float


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


class Warmth:
    """What one engine has warm; owned by whoever bids for it.  Times are seconds of one clock."""

    def __init__(self, *, notice_s: float, capacity: int = CAPACITY) -> None:
        """`notice_s`: how long after a bid its job may still come."""
        self._notice_s: Final = notice_s
        self._capacity: Final = capacity
        self._known: OrderedDict[tuple[PeerId, bytes], _Known] = OrderedDict()
        self._claims: OrderedDict[str, int] = OrderedDict()
        self._accounts: OrderedDict[PeerId, _Account] = OrderedDict()
        self._block = BLOCK
        self._restarts: int | None = None

    def __len__(self) -> int:
        return len(self._known)

    def warm_tokens(self, chain: Chain, engine: EngineStatistics, *, now: float) -> int:
        """Prompt tokens of this chain that need not be computed, should its job come."""
        self._notice_restart(engine)
        account = self._accounts.get(chain.gateway)
        if account is not None and not account.is_good(now):
            return 0
        for fingerprint in reversed(chain.fingerprints):
            known = self._known.get((chain.gateway, fingerprint))
            if known is None:
                continue
            if now + self._notice_s - known.used_at <= engine.prefix_horizon_s:
                return max(0, known.tokens // self._block - 1) * self._block
        return 0

    def claimed(self, request_id: RequestId, tokens: int) -> None:
        """A bid says that so many tokens are warm."""
        if tokens:
            _put(self._claims, request_id, tokens, capacity=CLAIMS)

    def computed(
        self, chain: Chain, event: TokenEvent, engine: EngineStatistics, *, resumed: int, now: float
    ) -> None:
        """The engine has read a job's prompt: learn from it, and hold what was claimed against it.

        `resumed`: tokens of the answer that another provider gave, read with the prompt.
        """
        self._notice_restart(engine)
        self._settle(chain, self._claims.pop(event.request_id, 0), event.cached_tokens, now=now)
        self.used(chain, now=now)
        if engine.prefix_horizon_s <= 0:
            return
        prompt_tokens = max(0, event.input_tokens - resumed)
        for fingerprint, tokens in marks_of(chain, prompt_tokens=prompt_tokens):
            known = _Known(tokens, used_at=now)
            _put(self._known, (chain.gateway, fingerprint), known, capacity=self._capacity)

    def used(self, chain: Chain, *, now: float) -> None:
        """The engine works on this chain, or did until now: none of it is old."""
        for fingerprint in chain.fingerprints:
            known = self._known.get((chain.gateway, fingerprint))
            if known is not None:
                known.used_at = now
                self._known.move_to_end((chain.gateway, fingerprint))

    def _settle(self, chain: Chain, claim: int, cached_tokens: int, *, now: float) -> None:
        if not claim:
            return
        found = min(claim, cached_tokens)
        account = self._accounts.get(chain.gateway)
        if account is None or account.is_over(now):
            account = _Account(opened_at=now)
        _put(self._accounts, chain.gateway, account, capacity=ACCOUNTS)
        account.found += found
        account.missing += claim - found
        if found == 0:
            self._forget(chain)
        elif found < claim:
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
