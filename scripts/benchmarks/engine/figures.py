"""What several rounds of a measurement say, against a target; no measuring here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """A bound, from below or from above; an aim that is missed is no failure."""

    bound: float
    at_least: bool = True
    aim: bool = False

    def met(self, value: float) -> bool | None:
        """Whether the value keeps to the bound; None for an aim that is missed."""
        kept = value >= self.bound if self.at_least else value <= self.bound
        return None if self.aim and not kept else kept

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{'aim ' if self.aim else ''}{sign} {self.bound:g}"


def at_least(bound: float, *, aim: bool = False) -> Target:
    """The larger the better."""
    return Target(bound, aim=aim)


def at_most(bound: float) -> Target:
    """The smaller the better."""
    return Target(bound, at_least=False)


Row = dict[str, Any]


def row(figure: str, rounds: Sequence[float], target: Target | None = None, *, unit: str) -> Row:
    """One figure: the median of its rounds, and between which values they lay."""
    median = statistics.median(rounds)
    measured = f"{shown(median)} {unit}"
    if len(rounds) > 1:
        measured += f" ({shown(min(rounds))}–{shown(max(rounds))}, n={len(rounds)})"
    return {
        "figure": figure,
        "measured": measured,
        "target": "stated" if target is None else f"{target} {unit}",
        "met": None if target is None else target.met(median),
        "median": median,
        "rounds": list(rounds),
        "unit": unit,
    }


def missing(figure: str, reason: str, target: Target | None = None) -> Row:
    """A figure that could not be measured, and why."""
    return {
        "figure": figure,
        "measured": f"not measured: {reason}",
        "target": "stated" if target is None else str(target),
        "met": None,
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round: what both had in common in a round falls out."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def shown(value: float) -> str:
    """Three digits that matter."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: each begins with another contender, so that none always follows one."""
    start = number % len(names) if names else 0
    return [*names[start:], *names[:start]]
