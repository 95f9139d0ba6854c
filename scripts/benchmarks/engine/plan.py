"""How much is measured, of what, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.engine.cores import Cores


@dataclass(frozen=True, slots=True)
class Plan:
    """One run of the benchmark."""

    model: Path
    """Its folder."""
    name: str
    """As the network calls it."""
    cores: Cores
    rounds: int
    batches: tuple[int, ...]
    tokens: int
    """That each stream is to be given, in a round of decoding."""
    opponents: tuple[str, ...]
    """Of the decode part."""
    quick: bool = False
