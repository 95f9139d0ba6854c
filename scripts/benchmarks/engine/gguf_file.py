"""A model folder of the Llama family as a GGUF file with the same weights, for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

TYPES: Final = {"float32": "F32", "bfloat16": "BF16"}


def write_gguf(folder: Path, target: Path, *, dtype: str) -> None:
    """Write `target` unless it is there; ValueError for a model of another family."""
    if target.exists():
        return
    import gguf

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"{config['model_type']} is not written as GGUF here")
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_shape(writer, config)
    _add_tokenizer(writer, folder, config)
    _add_tensors(writer, folder, config, dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_name("bench")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    import gguf

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {each["id"] for each in tokenizer["added_tokens"]}
    words = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL
            for _, number in words
        ]
    )
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _add_tensors(writer: Any, folder: Path, config: dict[str, Any], *, dtype: str) -> None:
    import gguf
    import torch
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                tensor = file.get_tensor(name)
                for part, count in heads.items():
                    if part in name:
                        tensor = _interleaved(tensor, count)
                known = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if tensor.dim() == 1 or dtype == "float32":
                    writer.add_tensor(known, tensor.float().contiguous().numpy())
                else:
                    bits = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
                    writer.add_tensor(
                        known,
                        bits,
                        raw_shape=bits.shape,
                        raw_dtype=gguf.GGMLQuantizationType.BF16,
                    )


def _interleaved(weight: Any, heads: int) -> Any:
    """Rotary pairs side by side, as llama.cpp has them, instead of half a head apart."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
