"""What a model folder must be before anything of it is loaded: found out in milliseconds.

Nothing here reads weights, runs code of the folder, or needs torch.  A safetensors file says in its
header how long it must be, so a download that broke off is seen without a byte of its data.  That
the data are the right ones is for the digests of the pull to say.

Code is never run, whatever a folder brings: pickled weights are refused, and an `auto_map` (a
pointer to Python files beside the weights) counts for nothing.  Where transformers has a class of
its own for the architecture, that is used; where it has none, the folder is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Final

_PULL: Final = "pull the model again"
_ELSEWHERE: Final = "serve it with another server and --engine openai"
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_HEADER_MOST: Final = 100_000_000
"""Bytes; the format's own limit."""
_JSON_MOST: Final = 64 * 2**20
"""Bytes of a config or an index; that of a model of a trillion weights has ten."""
_BITS: Final = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_COUNTS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Each layer has a tensor at least."""
_POSITIVE: Final = frozenset(
    {
        *_COUNTS, "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings",
    }
)  # fmt: skip
_ANY: Final = 2**62
_LISTS: Final = ("auto_mappings.py", "configuration_auto.py")
_SHOWN: Final = 60
"""Characters of a type that is none."""
_PICKLED: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS: Final = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tekken.json",),
)


class LoadError(Exception):
    """This folder cannot be run here; the message says what to do."""


def check_folder(folder: Path) -> None:
    """LoadError, naming the file and what to do, unless this is a whole model that is known here.

    Imports transformers, which takes seconds; `check_files` goes before that.
    """
    check_architecture(folder, check_files(folder))


def check_files(folder: Path) -> dict[str, Any]:
    """The folder's config; LoadError unless this is a whole and harmless model of a known type.

    Takes milliseconds.  A type that transformers' list names may yet turn out to be unknown.
    """
    if not folder.is_dir():
        raise LoadError(f"there is no folder {folder}: {_PULL}")
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} holds no model (no config.json): {_PULL}")
    config: dict[str, Any] = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise LoadError(f"{folder / 'config.json'} names no model_type: {_PULL}")
    if not _is_listed(model_type):
        raise LoadError(_unknown(folder, config))
    shapes = check_weights(folder)
    _check_sizes(folder / "config.json", config, shapes)
    _check_tokenizer(folder)
    return config


def is_encoder(folder: Path) -> bool:
    """Whether the model in this folder makes vectors, and no text; LoadError if it cannot be read.

    Folders for sentence-transformers say so; others have no head that makes text.
    """
    if (folder / "modules.json").is_file():
        return True
    architectures = read_json(folder / "config.json").get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return name.endswith(("Model", "ForMaskedLM")) and not name.endswith("HeadModel")


def check_architecture(folder: Path, config: dict[str, Any]) -> None:
    """LoadError if transformers has no class of its own for this type of model."""
    from transformers import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        raise LoadError(_unknown(folder, config))


def _is_listed(model_type: str) -> bool:
    """Whether transformers' list of types, read as a text, has it; True if there is no such list.

    To import the list takes seconds.
    """
    package = find_spec("transformers")
    if package is None or package.origin is None:
        return True
    folder = Path(package.origin).parent / "models" / "auto"
    try:
        listed = "".join((folder / name).read_text() for name in _LISTS)
    except OSError:
        return True
    return f'"{model_type}"' in listed or '"llama"' not in listed


def _unknown(folder: Path, config: dict[str, Any]) -> str:
    model_type = config["model_type"][:_SHOWN]
    if config.get("auto_map"):
        return (
            f"{folder / 'config.json'} wants code from its own folder to be run (auto_map, "
            f"model_type {model_type!r}), which this engine never does: {_ELSEWHERE}"
        )
    return (
        f"{folder / 'config.json'} has the model_type {model_type!r}, which transformers "
        f"{version('transformers')} does not know: upgrade transformers, or {_ELSEWHERE}"
    )


def check_weights(folder: Path) -> dict[str, Any]:
    """The tensors, as the headers describe them.

    LoadError unless all are there as safetensors, each file as long as it says.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return check_safetensors(folder / _SINGLE)
    if index.is_file():
        return _check_shards(index)
    raise LoadError(_no_weights(folder))


def _check_sizes(path: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """LoadError if a config speaks of more than its weights can be: building that takes forever.

    Or of less than one of anything.
    """
    values = sum(prod(each["shape"]) for each in tensors.values())
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for name, most in (*((name, len(tensors)) for name in _COUNTS), *_sizes(part, values)):
            said = part.get(name)
            if type(said) is int and said < 1 and name in _POSITIVE:
                raise LoadError(f"{path} says {name} {said}, which makes no sense: {_PULL}")
            if type(said) is int and said > most:
                raise LoadError(
                    f"{path} says {name} {said:,}, which the weights beside it are too few for: "
                    f"{_PULL}"
                )


def _sizes(part: dict[str, Any], values: int) -> Iterator[tuple[str, int]]:
    for name in part:
        if name.endswith(("_size", "_dim")) or name.startswith(("num_", "n_")):
            yield name, values
        elif name in _POSITIVE:
            yield name, _ANY


def _no_weights(folder: Path) -> str:
    if pickled := _first(folder, _PICKLED):
        return (
            f"{pickled} is pickled, and to open such a file is to run what is in it: get the "
            "model as safetensors, or convert it where you trust it "
            "(transformers: from_pretrained, then save_pretrained)"
        )
    if gguf := _first(folder, ("*.gguf",)):
        return f"{gguf} is to be converted first: run `pinaivu-node models pull {gguf}`"
    if other := _first(folder, ("*.safetensors",)):
        return f"{other} is not read without {_INDEX}, or as {_SINGLE}: {_PULL}"
    return f"{folder} holds no weights (no {_SINGLE}): {_PULL}"


def _first(folder: Path, patterns: Iterable[str]) -> Path | None:
    # training_args.bin and the like lie beside the weights of many a model.
    names = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return next((path for path in names if path.name != "training_args.bin"), None)


def _check_shards(index: Path) -> dict[str, Any]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise LoadError(f"{index} says nothing of where weights are: {_PULL}")
    expected: dict[str, set[str]] = {}
    for tensor, name in placed.items():
        # A name with a folder in it would be opened wherever it points.
        if not isinstance(name, str) or Path(name).name != name:
            raise LoadError(f"{index} points out of its folder ({name!r}): it is no sound model")
        expected.setdefault(name, set()).add(tensor)
    found: dict[str, Any] = {}
    for name, tensors in sorted(expected.items()):
        path = index.parent / name
        if not path.is_file():
            raise LoadError(f"{path} is missing: {_PULL}")
        tensors_of_file = check_safetensors(path)
        missing = tensors - tensors_of_file.keys()
        if missing:
            raise LoadError(f"{path} lacks {min(missing)}, which {index.name} promises: {_PULL}")
        found |= tensors_of_file
    return found


def check_safetensors(path: Path) -> dict[str, Any]:
    """The tensors that the header of this file names; LoadError unless it fits the file's length.

    Reads the header alone.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _HEADER_MOST:
            raise LoadError(f"{path} is no safetensors file: {_PULL}")
        if length > size - 8:
            raise LoadError(f"{path} is truncated: its header alone is longer: {_PULL}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = _end_of_data(header)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise LoadError(f"{path} is damaged ({_short(exc)}): {_PULL}") from exc
    whole = 8 + length + end
    if size < whole:
        raise LoadError(f"{path} is truncated, {size:,} bytes of {whole:,}: {_PULL}")
    if size > whole:
        raise LoadError(f"{path} is damaged, {size:,} bytes instead of {whole:,}: {_PULL}")
    return dict(header)


def _end_of_data(header: dict[str, Any]) -> int:
    """Bytes of all tensors together; ValueError unless they lie side by side."""
    end = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = tensor["data_offsets"]
        sides = tensor["shape"]
        if not all(type(number) is int and number >= 0 for number in (start, stop, *sides)):
            raise ValueError(f"{name} has a size that is none")
        if start != end or (stop - start) * 8 != prod(sides) * _BITS[tensor["dtype"]]:
            raise ValueError(f"{name} does not lie where it should")
        end = stop
    return end


def _check_tokenizer(folder: Path) -> None:
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        raise LoadError(f"{folder} holds no tokenizer (no tokenizer.json): {_PULL}")
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        read_json(settings)
    path = folder / "tokenizer.json"
    if path.is_file() and not _ends_like_json(path):
        raise LoadError(f"{path} is truncated: {_PULL}")


def _ends_like_json(path: Path) -> bool:
    """Whether the last character can be that of a JSON object; reading all of it takes seconds."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return file.read().rstrip().endswith(b"}")


def read_json(path: Path, *, kind: type = dict) -> Any:
    """The object, or whatever `kind` says, in this file; LoadError if it holds none."""
    try:
        if path.stat().st_size > _JSON_MOST:
            raise LoadError(f"{path} is too large to be what it is called: {_PULL}")
        said = json.loads(path.read_bytes())
    except OSError as exc:
        raise LoadError(f"{path} cannot be read ({exc.strerror}): {_PULL}") from exc
    except (ValueError, RecursionError) as exc:
        raise LoadError(f"{path} is damaged ({_short(exc)}): {_PULL}") from exc
    if not isinstance(said, kind):
        raise LoadError(f"{path} is damaged (it holds no {kind.__name__}): {_PULL}")
    return said


def _short(exc: Exception) -> str:
    return (str(exc) or type(exc).__name__)[:120]
