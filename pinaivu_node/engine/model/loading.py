"""A model folder to a model that is ready to run, or one sentence that says why not."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from pinaivu_node.engine.batching.blocks import BlockPool
from pinaivu_node.engine.batching.scheduler import Chunk
from pinaivu_node.engine.batching.sequence import Sequence
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.model import attention
from pinaivu_node.engine.model.cpu_cache import CpuKvCache, KvShape
from pinaivu_node.engine.model.fused import fuse
from pinaivu_node.engine.model.gpu_runner import on_gpu
from pinaivu_node.engine.model.pretrained import (
    Progress,
    check_config,
    device_of,
    dtype_of,
    in_a_line,
    read_model,
    read_tokenizer,
    use_threads,
)
from pinaivu_node.engine.model.quantised import quantise
from pinaivu_node.engine.model.runner import Runner, StepRunner
from pinaivu_node.engine.model.tensor_parallel import (
    Followers,
    LeadingRunner,
    Rank,
    check_devices,
)
from pinaivu_node.engine.model.weights import LoadError, check_folder

__all__ = ["LoadError", "LoadedModel", "load", "load_part"]

logger = logging.getLogger(__name__)

_PROBE_TOKENS: Final = 80
"""Enough for more than one block, and for the second step to attend to a finished one."""
_TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Of the root mean square difference of logits from transformers' own, relative to their spread.
bfloat16 keeps eight bits: two right computations of a model differ by up to a quarter of the
spread, where a wrong one is off by all of it."""
_TOLERANCE_SIXTEEN_BITS: Final = 0.05
"""With activations of sixteen bits, as a kernel for int8 takes them; measured: 0.005."""
_TOLERANCE_INT8: Final = 0.75
"""Between a model and its quantised self.  Measured: 0.1 and 0.3 on the probe, whose tokens make no
sense, 0.05 on prose; unrelated logits differ by 1.4."""
_ELSEWHERE: Final = "serve it with another server and --engine openai"
_KNOWN_TO_SLIDE: Final = frozenset(
    {
        "gemma2", "gemma3_text", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3",
        "qwen3_moe", "smollm3", "starcoder2",
    }
)  # fmt: skip
"""Families whose attention to a window of the past is held by a test; see `_limits`."""
_CPU_KV_SHARE: Final = 0.1
"""Of the machine's memory: the rest is for weights, other models, and everything else."""
_WHOLE_WINDOW_BYTES: Final = 1 << 30
"""A cache is at least so large or one context window, whichever is smaller."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights, tokenizer, cache, and what they were found to be."""

    runner: StepRunner
    pool: BlockPool
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    vocabulary: int
    context_window: int
    eos_ids: frozenset[int]


def load(config: EngineConfig, progress: Progress) -> LoadedModel:
    """The model in this folder, on the device or devices; LoadError if it cannot be."""
    if config.tensor_parallel == 1:
        return load_part(config, progress)
    check_devices(config, device_of(config.device))
    followers = Followers(config)
    model = load_part(config, progress, rank=followers.leader)
    return replace(model, runner=LeadingRunner(model.runner, followers))


def load_part(config: EngineConfig, progress: Progress, *, rank: Rank | None = None) -> LoadedModel:
    """As `load`, but of a model that is shared only the part of this process."""
    check_folder(config.model)
    check_config(config.model)
    if rank is not None and config.quantization is not None:
        raise LoadError(
            "a model that several GPUs share is not quantised: leave out one of the two"
        )
    device = device_of(config.device)
    use_threads(config, device)
    try:
        progress(0.0, "reading the tokenizer")
        tokenizer = read_tokenizer(config.model)
        progress(0.2, "reading weights")
        if rank is not None:
            rank.join(device)
        model = _read(config, device, rank)
        progress(0.6, "preparing layers")
        return _prepared(model, tokenizer, config=config, rank=rank, progress=progress)
    except torch.OutOfMemoryError as exc:
        raise LoadError(f"{config.model.name} does not fit in the memory of {device}") from exc
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as exc:
        raise LoadError(f"the model in {config.model} cannot be run: {in_a_line(exc)}") from exc


def _read(config: EngineConfig, device: torch.device, rank: Rank | None) -> Any:
    model = read_model(
        AutoModelForCausalLM,
        config.model,
        dtype=None if config.quantization else dtype_of(config.dtype, device),
        shared=None if rank is None else rank.plan(),
    )
    return model.to(device) if rank is None else model


def _prepared(
    model: Any, tokenizer: Any, *, config: EngineConfig, rank: Rank | None, progress: Progress
) -> LoadedModel:
    text_config = model.config.get_text_config()
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    window = _window(config, text_config)
    if rank is not None:  # said before a layer finds it out
        rank.kv_heads(model, _kv_shape(text_config, model.dtype).heads)
    probe = [(7919 * (place + 1)) % vocabulary for place in range(min(_PROBE_TOKENS, window))]
    expected = _probe_by_transformers(model, probe)
    if not expected.isfinite().all():
        raise LoadError(
            f"the model in {config.model} computes numbers that are none: its weights are damaged "
            f"(pull it again), or too large for {str(model.dtype).removeprefix('torch.')} "
            "(--dtype float32)"
        )
    if config.quantization is not None:
        expected = _quantised(model, probe, expected, dtype=dtype_of(config.dtype, model.device))
    attention.register()
    model.set_attn_implementation(attention.NAME)
    shape = _kv_shape(text_config, model.dtype)
    if rank is not None:
        shape = replace(shape, heads=rank.kv_heads(model, shape.heads))
    if model.device.type == "cpu":
        if rank is None:
            fuse(model)
        pages = _pages(config, shape, window=window)
        window = min(window, pages * CpuKvCache.page)
        runner = Runner(model, CpuKvCache(shape, pages=pages, window=window))
        pool = BlockPool(pages, size=CpuKvCache.page)
    else:
        least = rank.least if rank is not None else int
        gpu = on_gpu(model, shape, config, window=window, agree=least, progress=progress)
        window = gpu.window
        runner = gpu.runner
        pool = BlockPool(gpu.pages, size=gpu.page)
    progress(0.9, "checking the layers against the model's own")
    tolerance = _TOLERANCE[model.dtype]
    if config.quantization is not None:
        tolerance = max(tolerance, _TOLERANCE_SIXTEEN_BITS)
    _check_probe(runner, pool, probe, expected, tolerance=tolerance)
    return LoadedModel(
        runner=runner,
        pool=pool,
        tokenizer=tokenizer,
        device=model.device,
        dtype=model.dtype,
        vocabulary=vocabulary,
        context_window=window,
        eos_ids=_eos_ids(model, tokenizer),
    )


# --- the check ------------------------------------------------------------------------------------


@torch.inference_mode()
def _probe_by_transformers(model: Any, probe: list[int]) -> torch.Tensor:
    tokens = torch.tensor([probe], device=model.device)
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
    return logits[0].float()


def _quantised(
    model: Any, probe: list[int], expected: torch.Tensor, *, dtype: torch.dtype
) -> torch.Tensor:
    """Quantise in place; the probe's logits by the weights that are left of it, by transformers.

    LoadError for a model that does not bear it.
    """
    quantise(model, dtype=dtype)
    logits = _probe_by_transformers(model, probe)
    error = _difference(logits, expected)
    logger.info("logits differ from those before quantisation by %.1e of their spread", error)
    if not error <= _TOLERANCE_INT8:
        raise LoadError(
            f"this model does not bear quantisation (its logits are off by {error:.0%}): "
            "serve it without"
        )
    return logits


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square, relative to the spread."""
    return float((logits - expected).square().mean().sqrt() / expected.std())


def _check_probe(
    runner: StepRunner,
    pool: BlockPool,
    probe: list[int],
    expected: torch.Tensor,
    *,
    tolerance: float,
) -> None:
    """Compute the probe our way, in two chunks and a decode step; LoadError if it differs.

    So an architecture that does something which our attention or our layers do not know (sinks,
    biases by distance, a norm of its own) is refused instead of talking nonsense.
    """
    sequence = Sequence(probe)
    sequence.blocks = pool.take(-(-len(probe) // pool.size)) or []
    cuts = (0, len(probe) // 2, len(probe) - 1, len(probe))
    try:
        for start, end in pairwise(cuts):
            logits = runner.compute([Chunk(sequence, start, end - start)])
    except torch.OutOfMemoryError:
        raise
    # An architecture that is not known here may want anything.
    except Exception as exc:
        logger.info("the layers cannot be run", exc_info=True)
        raise LoadError(
            f"this engine does not know this architecture ({in_a_line(exc)}): {_ELSEWHERE}"
        ) from exc
    pool.release(sequence.blocks, now=0.0)
    error = _difference(logits, expected)
    logger.info("logits differ from transformers' own by %.1e of their spread", error)
    if not error <= tolerance:
        raise LoadError(
            f"this engine does not compute this architecture rightly (its logits are off by "
            f"{error:.0%}): {_ELSEWHERE}"
        )


# --- what the folder says -------------------------------------------------------------------------


def _window(config: EngineConfig, text_config: Any) -> int:
    """Tokens that a sequence may have at most."""
    window = min(
        int(getattr(text_config, "max_position_embeddings", 2**20)),
        config.context_window or 2**31,
    )
    for why, most in _limits(text_config):
        if most < window:
            logger.warning("the context is %d tokens instead of %d: %s", most, window, why)
            window = most
    return window


def _limits(text_config: Any) -> Iterator[tuple[str, int]]:
    """Up to where a model is surely computed as its makers meant it, and why not beyond."""
    types = getattr(text_config, "layer_types", None) or ["sliding_attention"]
    slides = getattr(text_config, "use_sliding_window", True) and "sliding_attention" in types
    for name in ("sliding_window", "attention_chunk_size"):
        width = getattr(text_config, name, None)
        # What is narrower than the probe, the probe shows.
        is_known = text_config.model_type in _KNOWN_TO_SLIDE or not slides
        if isinstance(width, int) and width > _PROBE_TOKENS and not is_known:
            yield f"nothing checks this family's {name}", width
    said = getattr(text_config, "rope_parameters", None) or {}
    for rope in (said, *(each for each in said.values() if isinstance(each, dict))):
        if rope.get("rope_type") == "longrope":
            least = rope.get("original_max_position_embeddings")
            least = least or getattr(text_config, "original_max_position_embeddings", None)
            # The angles of all positions change when a sequence grows beyond it, those in the
            # cache included, so that one long sequence would change what its batch mates say.
            if isinstance(least, int):
                yield "beyond it this model turns every position otherwise", least


def _kv_shape(text_config: Any, dtype: torch.dtype) -> KvShape:
    heads = getattr(text_config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise LoadError(
            f"a {text_config.model_type} has no attention, or one of its own: {_ELSEWHERE}"
        )
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return KvShape(
        layers=int(text_config.num_hidden_layers),
        heads=int(getattr(text_config, "num_key_value_heads", None) or heads),
        head_dim=int(width),
        dtype=dtype,
    )


def _pages(config: EngineConfig, shape: KvShape, *, window: int) -> int:
    page = shape.page_bytes(CpuKvCache.page)
    if config.kv_cache_gb is not None:
        size = int(config.kv_cache_gb * 2**30)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        size = int(_CPU_KV_SHARE * memory)
    least = min(_WHOLE_WINDOW_BYTES, -(-window // CpuKvCache.page) * page)
    return max(size, least) // page


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer; folders name one, several, or only the tokenizer's."""
    declared = model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int))
