"""A contender as the benchmark holds it: a process that takes orders, one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from scripts.benchmarks.engine.cores import Cores
from scripts.benchmarks.engine.environments import Environment, Unavailable

_ROOT: Final = Path(__file__).parents[3]
_LOAD_SECONDS: Final = 900
"""vLLM compiles for five minutes on a slow core."""
_ORDER_SECONDS: Final = 300


@dataclass(frozen=True, slots=True)
class Kind:
    """An engine, and how it is to be set up."""

    module: str
    """What to run; its `main` takes turns (see `contenders.turns`)."""
    environment: Environment | None = None
    """None: our own."""
    settings: dict[str, Any] = field(default_factory=dict)


CONTENDERS: Final = "scripts.benchmarks.engine.contenders"
OURS: Final = Kind(f"{CONTENDERS}.ours")


class Contender:
    """One that has loaded its model."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self._heard("load", _LOAD_SECONDS)

    def order(self, do: str, **what: Any) -> dict[str, Any]:
        """Have it do something; Unavailable if it dies of it or takes too long."""
        if self._process.stdin is None:
            raise AssertionError("it is a pipe")
        try:
            self._process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last is heard below
        return self._heard(do, _ORDER_SECONDS)

    def _heard(self, do: str, seconds: float) -> dict[str, Any]:
        if self._process.stdout is None:
            raise AssertionError("it is a pipe")
        clock = threading.Timer(seconds, self._process.kill)
        clock.start()
        try:
            line = self._process.stdout.readline()
        finally:
            clock.cancel()
        if not line:
            raise Unavailable(f"it ended over {do}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Unavailable(answer["failed"])
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][-200:] if lines else "it said nothing"


@contextmanager
def contending(
    kind: Kind, *, cores: Cores, model: Path, dtype: str, **settings: Any
) -> Iterator[Contender]:
    """Start one and wait until it is loaded; its process ends with the context.

    Raises Unavailable if it cannot be had.
    """
    python = sys.executable if kind.environment is None else str(kind.environment.python())
    told = {
        "cores": cores.engine,
        "threads": cores.threads,
        "model": str(model),
        "dtype": dtype,
        **kind.settings,
        **settings,
    }
    environment = os.environ | {
        "OMP_NUM_THREADS": str(cores.threads),
        "MKL_NUM_THREADS": str(cores.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with (
        tempfile.NamedTemporaryFile(suffix=".log") as log,
        subprocess.Popen(
            [python, "-m", kind.module, json.dumps(told)],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            yield Contender(process, Path(log.name))
        finally:
            process.kill()
