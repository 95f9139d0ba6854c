"""Who asks: keys looked up in memory, and in the database once a second at most."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import trio

from pinaivu_gateway.keys import ApiKey, hash_of
from pinaivu_gateway.store import Store

FRESH_SECONDS: Final = 1.0
"""How long a revocation by another process may go unnoticed."""
MOST_REMEMBERED: Final = 10_000
"""Valid keys, about 1 KiB each.  Wrong keys are not remembered: there are too many of them."""


@dataclass(frozen=True, slots=True)
class _Remembered:
    key: ApiKey
    until: float


class Keyring:
    """Authenticates by the store, with a short memory."""

    def __init__(self, store: Store) -> None:
        self._store: Final = store
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()

    async def find(self, key: str) -> ApiKey | None:
        """The key that this is, unless unknown or revoked.  Raises StoreError."""
        key_hash = hash_of(key)
        remembered = self._remembered.get(key_hash)
        if remembered is not None and trio.current_time() < remembered.until:
            return remembered.key
        asked_at = trio.current_time()
        found = await self._store.find_key(key_hash)
        if found is None or found.revoked_at is not None:
            self._remembered.pop(key_hash, None)
            return None
        # Counted from before the question: the answer may have been under way for a while.
        self._remembered[key_hash] = _Remembered(found, asked_at + FRESH_SECONDS)
        self._remembered.move_to_end(key_hash)
        while len(self._remembered) > MOST_REMEMBERED:
            self._remembered.popitem(last=False)
        return found
