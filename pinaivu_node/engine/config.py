"""What an operator may choose about an engine; each kind of engine receives its own record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, SecretStr

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")]
Quantization = Literal["int8"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class EngineConfig(BaseModel, frozen=True, extra="forbid"):
    """An engine of our own: a model folder run by a child process."""

    model: Path
    """A folder with safetensors weights, config and tokenizer."""
    device: Device = "auto"
    dtype: DtypeName = "auto"
    """auto: bfloat16 on CUDA; float32 on CPU, where two kernels then agree on every token."""
    quantization: Quantization | None = None
    """int8: linear layers and embeddings are kept in eight bits and computed with in `dtype`, in a
    quarter of float32's memory; on a CPU with AMX also faster, on a GPU slower."""
    threads: int | None = Field(default=None, ge=1, le=512)
    """CPU threads of the step loop; None: the physical cores less one for everything else."""
    context_window: int | None = Field(default=None, ge=16)
    """Lowers the model's own window, where its memory would not fit."""
    max_running: int | None = Field(default=None, ge=1, le=1024)
    """Answers at once; None: 16 on a CPU, where more only makes each slower, 64 on a GPU."""
    kv_cache_gb: float | None = Field(default=None, gt=0)
    """Memory for keys and values, prefixes that are kept included; None: a tenth of the machine's
    on a CPU, what `memory_fraction` leaves beside the weights on a GPU."""
    memory_fraction: float = Field(default=0.9, gt=0, le=1)
    """Of a GPU's memory, for weights, cache and work space together."""
    cuda_graphs: bool = True
    """Record decode steps on a GPU once and replay them: faster, but loading takes longer."""
    tensor_parallel: int = Field(default=1, ge=1, le=16)
    """GPUs of this machine that share the model, each a part of every layer."""
    prefill_chunk: int = Field(default=512, ge=16, le=65536)
    """Prompt tokens per step.  Between steps the child hears cancels and shows that it is alive:
    512 take about a second of one CPU core on a small model."""
    stretch: float = Field(default=2.0, ge=1.1, le=100)
    """How many times longer a step may take for a prompt's sake while others stream."""
    speculate: int | None = Field(default=None, ge=0, le=15)
    """Tokens guessed per step from what an answer said already; 0: none; None: 8 on a CPU, where
    it changes nothing but the time, none on a GPU, whose recorded steps have one token each."""
    max_queued: int = Field(default=8, ge=0, le=4096)
    """Requests that may wait for a place.  Eight short answers of a small model are some 20 s of
    one CPU core; a client who would wait longer is better served elsewhere."""
    load_timeout_s: float = Field(default=600.0, gt=0)
    """A 16 GB model from a slow disk takes about three minutes."""
    hang_timeout_s: float = Field(default=30.0, gt=0)
    """Silence of the step loop after which it counts as wedged.  The longest honest step, a prefill
    chunk of a large model on a busy CPU, takes some seconds."""
    ping_interval_s: float = Field(default=2.0, gt=0)
    restart_backoff_s: float = Field(default=0.5, gt=0)
    """Pause before the first restart; doubles up to half a minute while restarts fail."""

    def most_running(self, *, on_cpu: bool) -> int:
        """Answers at once, on such a device."""
        return self.max_running or (16 if on_cpu else 64)


class OpenAIEngineConfig(BaseModel, frozen=True, extra="forbid"):
    """An OpenAI-compatible server that the operator runs beside the node."""

    base_url: str = Field(pattern=r"^https?://")
    """Up to and including `/v1`."""
    model: str = Field(min_length=1)
    """The model's name on that server."""
    api_key: SecretStr | None = None
    context_window: int = Field(ge=16)
    """What the server was started with: the API does not tell."""
    capacity: int = Field(default=16, ge=1, le=4096)
    """Generations at once; such servers batch, and queue what is beyond their batch."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    stall_timeout_s: float = Field(default=120.0, gt=0)
    """Silence on an open stream after which the server counts as hung; covers a long prefill."""
    ready_timeout_s: float = Field(default=600.0, gt=0)
    """How long `wait_ready` gives a server that is still loading its model."""
