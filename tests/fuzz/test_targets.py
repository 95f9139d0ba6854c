"""A moment of fuzzing at every run of the suite; `targets.py` says how to do more of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="no atheris here: it has no wheel for this machine")


@pytest.mark.parametrize(("target", "runs"), [("yamux", 30_000), ("framing", 30_000)])
def test_no_bytes_break_it(target, runs, tmp_path):
    command = [
        sys.executable, Path(__file__).with_name("targets.py"), target,
        "-seed=1", f"-runs={runs}", "-max_len=600", "-len_control=0",
        f"-artifact_prefix={tmp_path}/",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
