"""A devnet for the modules that hurt nobody; `devnets.py` beside it starts them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from devnets import Network, devnet


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Shared by the tests of one module."""
    with devnet(tmp_path_factory.mktemp("devnet")) as running:
        yield running
