"""The process of one GPU more: `python -m pinaivu_node.engine.model.follower`.

Started by `tensor_parallel.Followers`.  It loads its part of the model, and computes the steps that
come from its standard input until that ends.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.model.loading import LoadError, load_part
from pinaivu_node.engine.model.step import Step
from pinaivu_node.engine.model.tensor_parallel import Rank, messages


def _hear(said: Iterator[bytes], steps: queue.SimpleQueue[Step], folder: Path) -> None:
    """Hand over steps until the leader is gone, then end the process."""
    for packed in said:
        steps.put(Step.unpack(packed))
    shutil.rmtree(folder, ignore_errors=True)  # the leader may have had no time to
    # Not sys.exit: the main thread may wait in a sum for the leader's part.
    os._exit(0)


def main() -> int:
    """Follow one leader; returns only if the model cannot be loaded."""
    # The daemon decides what ends when, and its word comes through the leader.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    said = messages(sys.stdin.buffer)
    orders = json.loads(next(said))
    config = EngineConfig.model_validate_json(orders["config"])
    rank = Rank(orders["rank"], config.tensor_parallel, Path(orders["folder"]))
    steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
    hearing = threading.Thread(target=_hear, args=(said, steps, rank.folder), daemon=True)
    hearing.start()
    try:
        model = load_part(config, lambda _share, _what: None, rank=rank)
    except LoadError as exc:
        print(f"rank {rank.number} cannot load: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        # The leader finds the same, most likely, and tells the daemon better than an exit would.
        hearing.join(timeout=10)
        return 1
    while True:
        model.runner.forward(steps.get())


if __name__ == "__main__":
    sys.exit(main())
