"""A town for each test.  `town.py` is found by its own name: tests are no package."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from town import Town, founded_in


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    async with founded_in(tmp_path) as founded:
        yield founded
