"""GGUF to a folder of safetensors, config and tokenizer, once: it then loads forty times faster.

Runs as its own process (`python -m pinaivu_node.models.convert FILE FOLDER`), so that torch and the
gigabytes it takes are gone when it is done, and an interrupt ends it at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from functools import cache
from pathlib import Path

from pinaivu_node.models.errors import PullFailed
from pinaivu_node.models.progress import Progress

_STEP = "step: "


def convert(source: Path, target: Path, *, progress: Progress) -> None:
    """Make `target` from a GGUF file; PullFailed, and no `target`, if it cannot be read."""
    last: deque[str] = deque(maxlen=3)
    with subprocess.Popen(  # noqa: S603 - this module itself, no shell
        [sys.executable, "-P", "-m", "pinaivu_node.models.convert", str(source), str(target)],
        stdin=subprocess.PIPE,  # never written to: it ends when we do, and the child with it
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            for line in process.stdout or ():
                if line.startswith(_STEP):
                    progress.step(line.removeprefix(_STEP).strip())
                elif line.strip():
                    last.append(line.strip())
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        reason = last[-1] if last else f"status {process.returncode}"
        raise PullFailed(f"{source.name} cannot be converted: {reason}")


def _convert(source: Path, target: Path) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers reads the file's vocabulary, seconds each time, for the tokenizer, for the config
    # and for the weights.
    gguf.GGUFReader = cache(gguf.GGUFReader)
    _say("converting: reading the tokenizer (up to a minute)")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    _say("converting: reading the weights")
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # transformers takes a model from GGUF for a quantised one and refuses to save it, although its
    # weights are plain float32 by now.
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)
    _say("converting: writing safetensors")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _say(step: str) -> None:
    sys.stdout.write(f"{_STEP}{step}\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """Wait for the end of stdin, then end the process, whatever it is doing."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
