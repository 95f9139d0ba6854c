"""A model folder to transformers' own objects, or one sentence that says why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import torch

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.model.weights import LoadError

Progress = Callable[[float, str], None]
"""Told how far loading is, 0 to 1, and what comes next."""


_MOST_SAID: Final = 300
"""Characters of what a library says."""
_LAYER: Final = re.compile(r"(?:layers|h|blocks)\.(\d+)\.")


def device_of(name: str) -> torch.device:
    """The device of this name; LoadError if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise LoadError(f"no CUDA device here, {name} was asked for: use --device cpu")
        index = torch.device(name).index or 0
        if index >= torch.cuda.device_count():
            raise LoadError(f"{name} does not exist: {torch.cuda.device_count()} CUDA device(s)")
    return torch.device(name)


def use_threads(config: EngineConfig, device: torch.device) -> None:
    """Let torch compute on as many CPU threads as the configuration says."""
    if device.type == "cpu":
        # One core is left for the event loops around: a step loop whose threads wait for a core
        # that is taken waits at every one of its hundreds of barriers.
        torch.set_num_threads(config.threads or max(1, torch.get_num_threads() - 1))


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The number format of this name, on this device."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        # GPUs before Ampere only make believe that they know bfloat16.
        knows = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if knows else torch.float16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_config(folder: Path) -> None:
    """LoadError unless transformers makes something of the folder's config.json."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Each family has checks of its own.
    except Exception as exc:
        raise LoadError(
            f"{folder / 'config.json'} makes no sense ({in_a_line(exc)}): pull the model again"
        ) from exc


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; LoadError if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # What is wrong in a tokenizer.json, tokenizers says by a bare Exception.
    except Exception as exc:
        raise LoadError(
            f"the tokenizer in {folder} cannot be read ({in_a_line(exc)}): pull the model again"
        ) from exc


def read_model(
    auto_class: Any,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    may_lack: tuple[str, ...] = (),
    shared: Any = None,
) -> Any:
    """The folder's model on the CPU, to be used and not trained; LoadError if it cannot be read.

    `auto_class` is one of transformers' AutoModel classes.  transformers fills weights that the
    files lack with random numbers and a warning; here that is an error, but for weights whose names
    begin with one of `may_lack`.

    dtype     None: that of the files
    shared    says which part of the model is this process's, and the part is put on its GPU
    """
    try:
        model, report = auto_class.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,  # the older format is code
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            **({} if shared is None else {"distributed_config": shared}),
        )
    except torch.OutOfMemoryError:
        raise
    # What a config.json can provoke in transformers has no common name.
    except Exception as exc:
        why = in_a_line(exc)
        if "ignore_mismatched_sizes" in why:
            why = "its weights have other shapes than its config.json calls for"
        raise LoadError(f"the model in {folder} cannot be read: {why}") from exc
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(may_lack))
    if missing:
        raise LoadError(
            f"the weights in {folder} lack {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ", which its config.json calls for: pull the model again"
        )
    _check_layers(model, folder, report["unexpected_keys"])
    return model.eval()


def _check_layers(model: Any, folder: Path, unused: Iterable[str]) -> None:
    """LoadError if files hold more layers than the model has: without them it is another model."""
    prefix = f"{model.base_model_prefix}."
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name in unused:
        layer = _LAYER.match(name.removeprefix(prefix))
        if layer is not None and isinstance(layers, int) and int(layer[1]) >= layers:
            raise LoadError(
                f"the weights in {folder} hold {name}, and its config.json speaks of {layers} "
                "layers: pull the model again"
            )


def in_a_line(exc: Exception) -> str:
    """What an error says, short enough for a sentence."""
    said = " ".join(str(exc).split())
    if isinstance(exc, KeyError) or not said:  # which says no more than the key
        said = f"{type(exc).__name__} {said}".rstrip()
    return said if len(said) <= _MOST_SAID else said[: _MOST_SAID - 1] + "…"
