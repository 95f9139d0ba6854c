"""Real weights for tests, pulled once and kept."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from pinaivu_node.models.progress import ConsoleProgress
from pinaivu_node.models.pull import pull
from pinaivu_node.models.store import InstalledModel, ModelStore

MODELS = Path(os.environ.get("PINAIVU_TEST_MODELS", "~/.cache/pinaivu-test/models")).expanduser()


def installed(name: str) -> InstalledModel:
    """A model of the catalogue; the first test to want it waits until it is here."""
    with ConsoleProgress(Console(stderr=True)) as progress:
        return pull(ModelStore(MODELS), name, progress=progress)
