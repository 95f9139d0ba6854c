"""A process that keeps books as fast as it can, until it is killed.  Run with a database URL."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parent))

from test_store import new_job, settlement

from pinaivu_node.coordinator.store import open_store


async def keep_books(url: str) -> None:
    async with open_store(url) as store:
        for number in itertools.count(1):
            if number == 21:
                print("busy", flush=True)  # noqa: T201
            await store.add_job(new_job(number))
            await store.settle(settlement(number))


trio.run(keep_books, sys.argv[1])
