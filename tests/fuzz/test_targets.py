"""A moment of fuzzing at every run of the suite; `scripts/fuzz` does more of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.fuzzing.plain import Failure, fuzz

ROOT = Path(__file__).parents[2]
HAS_ATHERIS = importlib.util.find_spec("atheris") is not None


def run(*arguments: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "scripts.fuzzing", *arguments,
        "-seed=1", "-max_len=600", f"-artifact_prefix={tmp_path}/",
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.skipif(not HAS_ATHERIS, reason="no atheris here: it has no wheel for this machine")
@pytest.mark.parametrize(
    ("target", "runs"), [("yamux", 10_000), ("noise", 3_000), ("framing", 20_000)]
)
def test_no_bytes_break_it(target, runs, tmp_path):
    done = run(target, f"-runs={runs}", "-len_control=0", tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["yamux", "noise", "framing"])
def test_no_bytes_break_it_without_atheris_either(target, tmp_path):
    done = run(target, "-runs=800", "-plain=1", tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# A line for each byte that is right: coverage is counted in lines.
STEPS = (
    lambda: 1,
    lambda: 2,
    lambda: 3,
)


def breaks_at_the_third_byte(data: bytes) -> None:
    for at, wanted in enumerate(b"yam"):
        if data[at : at + 1] != bytes([wanted]):
            return
        STEPS[at]()
    raise ZeroDivisionError


def test_our_own_fuzzer_finds_by_coverage_what_chance_would_not():
    """One in 16 million by chance."""
    with pytest.raises(Failure) as failure:
        fuzz(breaks_at_the_third_byte, within=__file__, seed=1, runs=100_000)
    assert failure.value.data.startswith(b"yam")
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


def test_a_file_that_made_it_fail_is_run_again(tmp_path):
    (tmp_path / "crash").write_bytes(b"\x00" * 40)
    done = run("yamux", "-plain=1", str(tmp_path / "crash"), tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
