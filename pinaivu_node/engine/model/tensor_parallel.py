"""Several GPUs of one machine that share a model: each holds a part of every layer.

There is a process for each GPU.  The engine's own is the leader: it talks to the daemon, plans
steps and draws tokens.  It starts the others, the followers, and sends every step to them as plain
numbers through a pipe before it computes its own part of it; what has to be summed over parts goes
from GPU to GPU within the layers, where transformers' plan for the architecture says.  All of them
load the model by the same code, so that each knows what the others compute.

None can go on without the others.  A follower whose pipe ends, ends; when a follower ends, the
leader's process does at once, in whatever sum it waits, and the daemon starts everything anew.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Final

import torch

from pinaivu_node.engine.batching.scheduler import Chunk
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.model.runner import StepRunner
from pinaivu_node.engine.model.step import Step, step_of
from pinaivu_node.engine.model.weights import LoadError

_COMMAND: Final = (sys.executable, "-P", "-m", "pinaivu_node.engine.model.follower")
_LENGTH: Final = struct.Struct("<I")
_SPLIT_KEYS: Final = frozenset({"k_proj", "qkv_proj", "query_key_value"})
"""What makes keys, by the names that architectures give it."""
_PATIENCE: Final = timedelta(minutes=10)
"""For what ranks do together: loading a large model from a slow disk takes some a good while longer
than others.  A step that hangs is the daemon's to notice, much sooner."""


@dataclass(frozen=True, slots=True)
class Rank:
    """Which of the processes this is."""

    number: int
    count: int
    folder: Path
    """Where the processes find each other: of this user alone, so nobody else can be one."""

    def join(self, device: torch.device) -> None:
        """Meet the others; LoadError if one does not come."""
        from torch import distributed

        # What transformers asks for, and the loopback: nothing here is for another machine.
        os.environ.update(
            RANK=str(self.number), LOCAL_RANK=str(self.number), WORLD_SIZE=str(self.count),
            NCCL_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.number)
        try:
            distributed.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=distributed.FileStore(  # type: ignore[attr-defined]
                    str(self.folder / "store"), self.count
                ),
                rank=self.number,
                world_size=self.count,
                timeout=_PATIENCE,
                device_id=torch.device("cuda", self.number) if on_gpu else None,
            )
        except RuntimeError as exc:  # includes what torch.distributed raises
            raise LoadError(f"the processes of {self.count} GPUs do not meet: {exc}") from exc

    def least(self, number: int) -> int:
        """The smallest that any of the processes says."""
        from torch import distributed

        on_gpu = distributed.get_backend() == "nccl"
        said = torch.tensor([number], device="cuda" if on_gpu else "cpu")
        distributed.all_reduce(said, distributed.ReduceOp.MIN)
        return int(said)

    def plan(self) -> Any:
        """What transformers wants to be told when it reads the model."""
        from transformers.distributed import DistributedConfig

        return DistributedConfig(tp_plan="auto", tp_size=self.count)

    def kv_heads(self, model: Any, heads: int) -> int:
        """Of so many of the model, how many this process has; LoadError if they do not divide."""
        plan: dict[str, str] = model.tp_plan or {}
        if not plan:
            raise LoadError(
                f"transformers has no plan to split a {model.config.model_type} over GPUs: "
                "run it on one"
            )
        splits = any(
            style == "colwise" and name.rpartition(".")[2] in _SPLIT_KEYS
            for name, style in plan.items()
        )
        if not splits:
            return heads
        if heads % self.count:
            raise LoadError(
                f"the model's {heads} KV heads cannot be shared out among {self.count} GPUs: "
                "use a number that divides them"
            )
        return heads // self.count


def check_devices(config: EngineConfig, device: torch.device) -> None:
    """LoadError unless this device is one of as many as are to share the model, as it is."""
    count = config.tensor_parallel
    if config.quantization is not None:
        raise LoadError("a quantised model is not shared among GPUs: run it on one, or as it is")
    if device.type == "cpu" and torch.cuda.is_available():
        raise LoadError("tensor_parallel takes the GPUs of a machine that has some")
    if device.index is not None:
        raise LoadError(f"tensor_parallel {count} takes the first {count} GPUs: use --device cuda")
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise LoadError(
            f"tensor_parallel {count} needs as many GPUs, here are {torch.cuda.device_count()}"
        )


class Followers:
    """The other processes; they end with this one, and this one with any of them."""

    def __init__(self, config: EngineConfig) -> None:
        folder = Path(tempfile.mkdtemp(prefix="pinaivu-ranks-"))
        self.leader = Rank(0, config.tensor_parallel, folder)
        self._pipes: list[IO[bytes]] = []
        for number in range(1, config.tensor_parallel):
            process = subprocess.Popen(  # noqa: S603 - a module of ours
                _COMMAND, stdin=subprocess.PIPE, stdout=sys.stderr
            )
            if process.stdin is None:
                raise AssertionError("stdin is a pipe")
            self._pipes.append(process.stdin)
            orders = {"rank": number, "folder": str(folder), "config": config.model_dump_json()}
            _write(process.stdin, json.dumps(orders).encode())
            threading.Thread(
                target=self._watch, args=(number, process), name=f"rank {number}", daemon=True
            ).start()

    def send(self, step: Step) -> None:
        """Have them compute a step; BrokenPipeError if one is gone."""
        packed = step.pack()
        for pipe in self._pipes:
            _write(pipe, packed)

    def _watch(self, number: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        # One that exited said why; of a signal nobody else speaks.
        how = f"exited with status {status}" if status >= 0 else f"was ended by signal {-status}"
        sys.stderr.write(f"rank {number} of the engine {how}\n")
        sys.stderr.flush()
        shutil.rmtree(self.leader.folder, ignore_errors=True)
        # Not sys.exit: the main thread waits in a sum for what will never come.
        os._exit(1)


class LeadingRunner:
    """A `StepRunner` that has the followers compute along."""

    def __init__(self, runner: StepRunner, followers: Followers) -> None:
        self._runner = runner
        self._followers = followers

    def compute(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """See `StepRunner.compute`."""
        return self.forward(step_of(chunks))

    def forward(self, step: Step) -> torch.Tensor:
        """See `StepRunner.forward`."""
        self._followers.send(step)
        return self._runner.forward(step)

    def survives(self, error: Exception) -> bool:  # noqa: ARG002 - as the protocol has it
        """No: the followers may be in the midst of what the leader gave up."""
        return False


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def messages(pipe: IO[bytes]) -> Iterator[bytes]:
    """What the leader sends, until it is gone."""
    while len(head := pipe.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        data = pipe.read(length)
        if len(data) < length:
            return
        yield data
