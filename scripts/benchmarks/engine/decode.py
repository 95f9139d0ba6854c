"""Tokens per CPU second while every stream of a batch gets them, and who else makes how many."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from scripts.benchmarks.engine import environments
from scripts.benchmarks.engine.contender import CONTENDERS, OURS, Contender, Kind, contending
from scripts.benchmarks.engine.environments import Unavailable, note
from scripts.benchmarks.engine.figures import Row, Target, at_least, missing, ratios, row, turns
from scripts.benchmarks.engine.gguf_file import write_gguf
from scripts.benchmarks.engine.plan import Plan

PROMPT_TOKENS: Final = 64
# Prompts are computed at once, for only what comes after them is counted here, and nothing is
# guessed: the others were not asked to guess either.
_PLAIN: Final = {"stretch": 100, "speculate": 0}
PINAIVU: Final = "pinaivu"
INT8: Final = "pinaivu int8"
GENERATE: Final = "transformers generate"
BATCHING: Final = "transformers batching"
VLLM: Final = "vLLM eager"
COMPILED: Final = "vLLM compiled"
LLAMA_CPP: Final = "llama.cpp"
KINDS: Final[Mapping[str, Kind]] = {
    PINAIVU: replace(OURS, settings={"config": _PLAIN}),
    INT8: replace(OURS, settings={"config": {**_PLAIN, "quantization": "int8"}}),
    GENERATE: Kind(f"{CONTENDERS}.transformers_generate"),
    BATCHING: Kind(f"{CONTENDERS}.transformers_batching"),
    VLLM: Kind(f"{CONTENDERS}.vllm_cpu", environments.VLLM),
    COMPILED: Kind(f"{CONTENDERS}.vllm_cpu", environments.VLLM, {"compiled": True}),
    LLAMA_CPP: Kind(f"{CONTENDERS}.llama_cpp", environments.LLAMA_CPP),
}
OPPONENTS: Final = tuple(name for name in KINDS if name != PINAIVU)
QUICK_OPPONENTS: Final = tuple(name for name in OPPONENTS if KINDS[name].environment is None)
DTYPES: Final = ("float32", "bfloat16")
_SHORT: Final = {"float32": "fp32", "bfloat16": "bf16"}

_TARGETS: Final[Mapping[tuple[str, str], Mapping[int, Target]]] = {
    ("float32", GENERATE): {16: at_least(1.8)},
    ("bfloat16", GENERATE): {16: at_least(1.6)},
    ("float32", BATCHING): {16: at_least(2.5)},
    **{(dtype, VLLM): {batch: at_least(1.0) for batch in (1, 8, 16, 32)} for dtype in DTYPES},
    **{
        (dtype, COMPILED): {batch: at_least(1.0, aim=True) for batch in (1, 8, 16, 32)}
        for dtype in DTYPES
    },
    **{(dtype, LLAMA_CPP): {16: at_least(0.9), 32: at_least(1.2)} for dtype in DTYPES},
}
"""Of our tokens per CPU second, divided by theirs."""
_SHARES: Final = {"float32": at_least(0.45), "bfloat16": at_least(0.5, aim=True)}
_GROWTH: Final = at_least(7)


@dataclass
class Rates:
    """Of one dtype: tokens per CPU second of each round, by contender and batch."""

    rates: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Who could not be measured, and why."""
    bandwidth: list[float] = field(default_factory=list)
    """Bytes that the core reads per second, in the same rounds."""

    def add(self, name: str, batch: int, rate: float) -> None:
        """One round more."""
        self.rates.setdefault(name, {}).setdefault(batch, []).append(rate)

    def drop(self, name: str, reason: str) -> None:
        """It cannot go on: what it did is not comparable any more."""
        self.rates.pop(name, None)
        self.absent[name] = reason


def measure(plan: Plan) -> tuple[dict[str, Any], list[Row]]:
    """All contenders in both dtypes, by turns."""
    result: dict[str, Any] = {}
    rows: list[Row] = []
    for dtype in DTYPES:
        rates = _contest(plan, dtype)
        weights = weight_bytes(plan.model, dtype)
        result[dtype] = {
            "tokens_per_cpu_second": rates.rates,
            "absent": rates.absent,
            "read_bandwidth_bytes_per_s": rates.bandwidth,
            "weight_bytes": weights,
        }
        rows += rows_of(rates, dtype, weights=weights, opponents=plan.opponents)
    return result, rows


def _contest(plan: Plan, dtype: str) -> Rates:
    rates = Rates()
    wanted = [
        name
        for name in (PINAIVU, *plan.opponents)
        # transformers' own batching has a target in fp32 alone, and takes longest of all.
        if (name, dtype) != (BATCHING, "bfloat16")
    ]
    with _loaded(plan, wanted, dtype, rates) as contenders:
        for number in range(plan.rounds):
            note(f"decode {_SHORT[dtype]}: round {number + 1} of {plan.rounds}")
            for batch in plan.batches:
                for name in turns(list(contenders), number):
                    _take_turn(plan, contenders, name, batch, number, rates)
            rates.bandwidth.append(contenders[PINAIVU].order("bandwidth")["bytes_per_s"])
    return rates


@contextmanager
def _loaded(
    plan: Plan, names: Iterable[str], dtype: str, rates: Rates
) -> Iterator[dict[str, Contender]]:
    contenders: dict[str, Contender] = {}
    with ExitStack() as stack:
        for name in names:
            note(f"decode {_SHORT[dtype]}: loading {name}")
            kind = KINDS[name]
            try:
                more = {"gguf": _gguf(plan.model, dtype)} if name == LLAMA_CPP else {}
                context = contending(kind, cores=plan.cores, model=plan.model, dtype=dtype, **more)
                contender = stack.enter_context(context)
                # The first use of every kernel and shape is nobody's fault.
                contender.order("decode", batch=2, tokens=4, length=PROMPT_TOKENS, seed=10**6)
            except (Unavailable, ValueError) as exc:
                if name == PINAIVU:
                    raise
                note(f"{name}: {exc}")
                rates.absent[name] = str(exc)
                continue
            contenders[name] = contender
        yield contenders


def _take_turn(
    plan: Plan, contenders: dict[str, Contender], name: str, batch: int, number: int, rates: Rates
) -> None:
    try:
        made = contenders[name].order(
            "decode",
            batch=batch,
            tokens=plan.tokens,
            length=PROMPT_TOKENS,
            seed=1000 * number + batch,
        )
    except Unavailable as exc:
        if name == PINAIVU:
            raise
        note(f"{name}: {exc}")
        rates.drop(name, str(exc))
        del contenders[name]
        return
    rates.add(name, batch, made["tokens"] / made["cpu_s"])


# --- what it says ---------------------------------------------------------------------------------


def rows_of(rates: Rates, dtype: str, *, weights: int, opponents: Sequence[str]) -> list[Row]:
    """Every figure of one dtype."""
    ours = rates.rates[PINAIVU]
    short = _SHORT[dtype]
    rows = [
        row(f"{short} {name}, batch {batch}", made, unit="tokens/CPU s")
        for name, batches in rates.rates.items()
        for batch, made in batches.items()
    ]
    if 1 in ours and 16 in ours:
        rows.append(
            row(f"{short} batch 16 ÷ batch 1", ratios(ours[16], ours[1]), _GROWTH, unit="×")
        )
    if 1 in ours:
        shares = [
            rate * weights / read for rate, read in zip(ours[1], rates.bandwidth, strict=True)
        ]
        rows.append(row(f"{short} weights read, of bandwidth", shares, _SHARES[dtype], unit="of 1"))
    for name in opponents:
        rows += _against(name, rates, dtype)
    return rows


def _against(name: str, rates: Rates, dtype: str) -> list[Row]:
    targets = _TARGETS.get((dtype, name), {})
    ours = rates.rates[PINAIVU]
    if name in rates.absent:
        bound = next(iter(targets.values()), None)
        return [missing(f"{_SHORT[dtype]} ÷ {name}", rates.absent[name], bound)]
    theirs = rates.rates.get(name, {})
    return [
        row(
            f"{_SHORT[dtype]} ÷ {name}, batch {batch}",
            ratios(ours[batch], made),
            targets.get(batch),
            unit="×",
        )
        for batch, made in theirs.items()
    ]


# --- the weights ----------------------------------------------------------------------------------


def weight_bytes(folder: Path, dtype: str) -> int:
    """Of all tensors in a model folder, each once, in this dtype: what a decode step reads.

    A tied embedding is the output layer, which is read whole; of an untied one a step reads a row,
    which is counted as if it were all.
    """
    from math import prod

    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count * {"float32": 4, "bfloat16": 2}[dtype]


def _gguf(folder: Path, dtype: str) -> str:
    """The same weights as GGUF, kept for the next run."""
    files = sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors"))
    key = hashlib.sha256(repr((str(folder), files)).encode()).hexdigest()[:16]
    target = environments.cache_folder() / f"{key}-{dtype}.gguf"
    write_gguf(folder, target, dtype=dtype)
    return str(target)
