"""What requests of one engine do to each other: shared beginnings, long prompts, grammars, guesses.

All in the engine's own process and in CPU time, so that a busy machine does not blur it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from scripts.benchmarks.engine.contender import OURS, Contender, Kind, contending
from scripts.benchmarks.engine.contenders.prose import KINDS as TALK
from scripts.benchmarks.engine.environments import note
from scripts.benchmarks.engine.figures import Row, at_least, at_most, quantile, ratios, row
from scripts.benchmarks.engine.plan import Plan

SHARED_TOKENS: Final = 512
OWN_TOKENS: Final = 16
STREAMS: Final = 8
_DTYPE: Final = "float32"
_PLAIN: Final = replace(OURS, settings={"config": {"stretch": 100, "speculate": 0}})
_GUESSING: Final = replace(OURS, settings={"config": {"stretch": 100}})
Measured = tuple[dict[str, Any], list[Row]]


def prefix(plan: Plan) -> Measured:
    """Time to first token of a prompt whose beginning was computed before, and of one that was."""
    with _ours(plan) as engine:
        engine.order("first_token", shared=64, own=OWN_TOKENS, seed=10**6)
        rounds = [
            engine.order("first_token", shared=SHARED_TOKENS, own=OWN_TOKENS, seed=seed)
            for seed in range(max(3, plan.rounds))
        ]
    cold = [1000 * each["cold_s"] for each in rounds]
    warm = [1000 * each["warm_s"] for each in rounds]
    return {"cold_ms": cold, "warm_ms": warm}, [
        row(f"first token, cold, {SHARED_TOKENS + OWN_TOKENS} tokens", cold, unit="CPU ms"),
        row(f"first token, {SHARED_TOKENS} of them warm", warm, unit="CPU ms"),
        row("warm first token ÷ cold", ratios(warm, cold), at_most(0.2), unit="×"),
    ]


def joining(plan: Plan) -> Measured:
    """What eight streams notice of a prompt of 4,000 tokens that joins them."""
    figures: dict[str, list[float]] = {"idle_p99_ms": [], "joined_p99_ms": [], "prompt_s": []}
    with _ours(plan) as engine:
        for number in range(plan.rounds):
            note(f"joining: round {number + 1} of {plan.rounds}")
            made = engine.order(
                "joining", streams=STREAMS, idle_steps=60 if plan.quick else 200, seed=10 * number
            )
            figures["idle_p99_ms"].append(1000 * quantile(made["idle_s"], 0.99))
            figures["joined_p99_ms"].append(1000 * quantile(made["joined_s"], 0.99))
            figures["prompt_s"].append(sum(made["joined_s"]))
    raised = ratios(figures["joined_p99_ms"], figures["idle_p99_ms"])
    return figures, [
        row("8 streams, between tokens, p99", figures["idle_p99_ms"], unit="CPU ms"),
        row("… while 4,000 tokens join, p99", figures["joined_p99_ms"], unit="CPU ms"),
        row("… as a multiple", raised, at_most(2.5), unit="×"),
        row("… until that prompt has its token", figures["prompt_s"], unit="CPU s"),
    ]


def constraint(plan: Plan) -> Measured:
    """Eight streams, none of them and all of them under a JSON schema."""
    figures: dict[str, list[float]] = {"free": [], "one of eight": [], "all of eight": []}
    with _ours(plan, _PLAIN) as engine:
        for number in range(plan.rounds + 1):
            note(f"constraint: round {number} of {plan.rounds}")
            for name, bound in zip(figures, (0, 1, STREAMS), strict=True):
                made = engine.order("constrained", batch=STREAMS, tokens=plan.tokens, bound=bound)
                if number:  # the first compiles the grammar
                    figures[name].append(made["tokens"] / made["cpu_s"])
    return figures, [
        row(
            f"JSON schema on {name}, ÷ none",
            ratios(figures[name], figures["free"]),
            at_least(0.9),
            unit="×",
        )
        for name in ("one of eight", "all of eight")
    ]


def speculation(plan: Plan) -> Measured:
    """Tokens per CPU second with guesses from the prompt and without."""
    figures: dict[str, dict[str, list[float]]] = {}
    with _ours(plan, _GUESSING) as guessing, _ours(plan, _PLAIN) as plain:
        for number in range(plan.rounds + 1):
            note(f"speculation: round {number} of {plan.rounds}")
            for kind in TALK:
                for batch in (1, STREAMS):
                    on, off = (
                        _talk(engine, kind, batch, 2 * plan.tokens) for engine in (guessing, plain)
                    )
                    if number:
                        both = figures.setdefault(f"{kind} text, batch {batch}", {})
                        both.setdefault("on", []).append(on)
                        both.setdefault("off", []).append(off)
    return figures, [
        row(f"guesses on ÷ off, {name}", ratios(both["on"], both["off"]), unit="×")
        for name, both in figures.items()
    ]


def _talk(engine: Contender, kind: str, batch: int, tokens: int) -> float:
    made = engine.order("talk", kind=kind, batch=batch, tokens=tokens)
    return float(made["tokens"] / made["cpu_s"])


def _ours(plan: Plan, kind: Kind = OURS) -> Any:
    return contending(kind, cores=plan.cores, model=plan.model, dtype=_DTYPE)
