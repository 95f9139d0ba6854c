"""What the tests of the coordinator share; the peers themselves are in `market_town.py`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

# import-mode=importlib keeps test folders off the path; the town is too long for a conftest.
sys.path.insert(0, str(Path(__file__).parent))

from market_town import Town, open_town

from pinaivu_node.coordinator.store import sqlite_url


@pytest.fixture
def database(tmp_path: Path) -> str:
    return sqlite_url(tmp_path / "books.db")


@pytest.fixture
async def town(autojump_clock, database: str) -> AsyncIterator[Town]:
    """A coordinator with nobody around it; its test names `autojump_clock` too."""
    async with open_town(database) as opened:
        yield opened
