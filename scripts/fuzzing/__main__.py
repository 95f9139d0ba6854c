"""`scripts/fuzz` in Python: atheris where there is one, else our own."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import secrets
import sys
from pathlib import Path
from typing import Any, Final

from scripts.fuzzing.plain import Failure, Target, fuzz

NAMES: Final = ("yamux", "noise", "framing")


def main() -> None:
    """Run the target that the first argument names."""
    name, *options = sys.argv[1:] or [""]
    if name not in NAMES:
        sys.exit(f"fuzz: what?  One of: {', '.join(NAMES)}")
    if "-plain=1" in options or importlib.util.find_spec("atheris") is None:
        _fuzz_plainly(name, [option for option in options if option != "-plain=1"])
    else:
        _fuzz_with_atheris(name, options)


def _target(name: str) -> Target:
    target: Target = importlib.import_module("scripts.fuzzing.targets").TARGETS[name]
    return target


def _fuzz_with_atheris(name: str, options: list[str]) -> None:
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["pinaivu_node"]):
        target = _target(name)
    atheris.Setup([f"scripts/fuzz {name}", *options], target)
    atheris.Fuzz()


def _fuzz_plainly(name: str, options: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"scripts/fuzz {name}", allow_abbrev=False)
    parser.add_argument("-runs", type=int)
    parser.add_argument("-max_total_time", type=float, dest="seconds")
    parser.add_argument("-seed", type=int)
    parser.add_argument("-max_len", type=int, default=600, dest="longest")
    parser.add_argument("-artifact_prefix", default="")
    parser.add_argument("files", type=Path, nargs="*")
    said, unknown = parser.parse_known_args(options)
    if unknown:
        print(f"fuzz: of no use without atheris: {' '.join(unknown)}", file=sys.stderr)
    target = _target(name)
    for path in said.files:
        target(path.read_bytes())
    if said.files:
        return
    seed = secrets.randbits(32) if said.seed is None else said.seed
    print(f"fuzz: {name}, -seed={seed}; Ctrl-C ends it", file=sys.stderr, flush=True)
    try:
        lines = fuzz(
            target,
            within="pinaivu_node",
            seed=seed,
            runs=said.runs,
            seconds=said.seconds,
            longest=said.longest,
        )
    except Failure as failure:
        artifact = Path(f"{said.artifact_prefix}crash-{name}-{seed}")
        artifact.write_bytes(failure.data)
        print(f"fuzz: kept in {artifact}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        return
    print(f"fuzz: nothing failed; {lines} lines were reached", file=sys.stderr)


if __name__ == "__main__":
    main()
