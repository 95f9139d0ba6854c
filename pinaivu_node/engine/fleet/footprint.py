"""How much memory a model takes: estimated from its files, measured on the process that runs it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from pinaivu_node.engine.config import EngineConfig

_MIB: Final = 2**20
_GIB: Final = 2**30
_PROCESS: Final = 500 * _MIB
"""An engine process before it has weights: the interpreter, torch, transformers, kernels."""
_PER_WORD: Final = 1900
"""Bytes for each token of the vocabulary: in the tokenizer, and once more for constraints."""
_WORK: Final = 256 * _MIB
"""Activations and logits of a step."""
_OWN: Final = ("RssAnon:", "RssShmem:")
_HEADER_MOST: Final = 100 * _MIB
"""What the format itself allows a header."""
_START_S: Final = 4.0
"""Until an engine process has imported what it needs and has warmed up."""
_BYTES_PER_SECOND: Final = 300 * _MIB
"""From a plain SSD into tensors.  The first load of a model corrects it."""
_BUDGET_PERCENT: Final = 80
"""Of the memory of the machine: the rest is the system's, its file cache's, and the daemon's."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What the files of a model say about its size."""

    values: int
    bytes_on_disk: int


def weigh(folder: Path) -> Weights:
    """Count the weights in a model's folder; a file that cannot be read counts by its size.

    Whether the files are sound is for the engine to say when it loads them.
    """
    values = size = 0
    for path in folder.glob("*.safetensors"):
        on_disk = path.stat().st_size
        size += on_disk
        try:
            values += _values_in(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            values += on_disk // 2  # as if it were stored in bfloat16, which most are
    return Weights(values=values, bytes_on_disk=size)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an engine will take, before it was ever run."""

    need: int
    """Bytes in memory, when it works."""
    spare: int
    """Of these, what it does not touch before it works."""
    load_s: float
    """Seconds until it is ready."""


def footprint_of(config: EngineConfig) -> Footprint:
    """An estimate for an engine of this configuration; reads the headers of its files."""
    weights = weigh(config.model)
    spare = kv_bytes(config) + _WORK
    process = _PROCESS + _PER_WORD * _number(_read_config(config.model), "vocab_size")
    return Footprint(
        # Where several GPUs share a model, the budget is of one of them.
        need=round(weights.values * _width(config) / config.tensor_parallel) + process + spare,
        spare=spare,
        load_s=_START_S + weights.bytes_on_disk / _BYTES_PER_SECOND,
    )


def kv_bytes(config: EngineConfig) -> int:
    """Bytes of the engine's cache of keys and values: what it was given, or one context at least.

    An engine that was given nothing takes what it finds, so of several each should be.
    """
    said = _read_config(config.model)
    layers = _number(said, "num_hidden_layers")
    heads = _number(said, "num_key_value_heads") or _number(said, "num_attention_heads")
    width = _number(said, "head_dim") or (
        _number(said, "hidden_size") // max(1, _number(said, "num_attention_heads"))
    )
    window = config.context_window or _number(said, "max_position_embeddings")
    context = round(2 * layers * heads * width * window * _number_width(config))
    given = round((config.kv_cache_gb or 0) * _GIB)
    return max(given, min(context, _GIB))


def resident_bytes(pid: int) -> int | None:
    """Memory that a process has in RAM now; None where the system does not say.

    What is mapped from a file does not count: the system takes it back when it needs it.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(_OWN))
    except (OSError, ValueError, IndexError):
        return None


def default_budget(device: str) -> int | None:
    """Bytes that models may take together: 80 % of this machine's memory, or of its GPU's.

    None, no limit, where nobody can say.
    """
    total = _gpu_memory(device) if _on_gpu(device) else _machine_memory()
    return None if total is None else total * _BUDGET_PERCENT // 100


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and Path("/dev/nvidiactl").exists())


def _width(config: EngineConfig) -> float:
    """Bytes per weight in memory; norms, which int8 leaves as they are, are too few to count."""
    return 1.0 if config.quantization == "int8" else _number_width(config)


def _number_width(config: EngineConfig) -> float:
    """Bytes of a number that is computed with."""
    if config.dtype == "auto":
        return 2.0 if _on_gpu(config.device) else 4.0
    return 4.0 if config.dtype == "float32" else 2.0


def _values_in(path: Path) -> int:
    """Weights in one safetensors file, by its header: a length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_MOST:
            raise ValueError(f"{path} has no sound header")
        header: dict[str, Any] = json.loads(file.read(length))
    return sum(prod(each["shape"]) for name, each in header.items() if name != "__metadata__")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        said = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(said, dict):
        return {}
    inner = said.get("text_config")
    return said | (inner if isinstance(inner, dict) else {})


def _number(said: dict[str, Any], key: str) -> int:
    value = said.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def _machine_memory() -> int | None:
    """What this machine has, or what the container that we are in may take of it."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # "max", or no such group
        return total


def _gpu_memory(device: str) -> int | None:
    """What the driver says that this GPU has; the daemon itself never loads torch."""
    index = device.partition(":")[2] or "0"
    command = ["nvidia-smi", "-i", index, "--query-gpu=memory.total"]
    command.append("--format=csv,noheader,nounits")
    try:
        said = subprocess.run(  # noqa: S603 - our own words
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout
        return int(said.split()[0]) * _MIB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
