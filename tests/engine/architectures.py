"""Configurations of the families of models, as small as they can be, with weights of dice."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .conftest import make_tokenizer

WINDOW = 24
"""Of the families whose layers look back only so far."""

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Architecture:
    config: str
    """Name of the configuration's class in transformers."""
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: _SIZES)


SERVED = {
    "llama": Architecture(
        "LlamaConfig",
        {
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama-dynamic": Architecture(
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "qwen2": Architecture("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-sliding": Architecture(
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": Architecture("Qwen3Config", {"head_dim": 12}),
    "gemma2": Architecture(
        "Gemma2Config",
        {
            "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
    "mistral": Architecture("MistralConfig", {"sliding_window": WINDOW}),
    "phi3": Architecture(
        "Phi3Config", {"sliding_window": WINDOW, "partial_rotary_factor": 0.5}
    ),
    "smollm3": Architecture(
        "SmolLM3Config",
        {
            "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    "qwen3-moe": Architecture(
        "Qwen3MoeConfig",
        {
            "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        },
    ),
    "mixtral": Architecture("MixtralConfig", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "granite": Architecture(
        "GraniteConfig", {"attention_multiplier": 0.2, "residual_multiplier": 0.5}
    ),
    "olmo2": Architecture("Olmo2Config"),
    "qwen2-moe": Architecture(
        "Qwen2MoeConfig",
        {
            "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "starcoder2": Architecture("Starcoder2Config", {"sliding_window": WINDOW}),
    "cohere": Architecture("CohereConfig", {"logit_scale": 0.5}),
    "gpt2": Architecture(
        "GPT2Config", sizes={"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    ),
    "gpt-neox": Architecture(
        "GPTNeoXConfig",
        sizes={key: size for key, size in _SIZES.items() if key != "num_key_value_heads"},
    ),
    "phi": Architecture("PhiConfig"),
}  # fmt: skip

REFUSED = {
    "gpt-oss": Architecture(
        "GptOssConfig", {"num_local_experts": 4, "head_dim": 8, "sliding_window": WINDOW}
    ),
    "bloom": Architecture("BloomConfig", sizes={"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": Architecture("MambaConfig", sizes={"hidden_size": 32, "num_hidden_layers": 2}),
    "deepseek-v3": Architecture(
        "DeepseekV3Config",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
            "num_key_value_heads": 4, "first_k_dense_replace": 1,
        },
    ),
}  # fmt: skip


def make_folder(architecture: Architecture, folder: Path, *, seed: int = 7) -> Path:
    """The folder, with a model of random weights and a byte-level tokenizer in it."""
    import torch
    import transformers

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = getattr(transformers, architecture.config)(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,  # far from uniform, so that no two tokens tie
        **(architecture.sizes | architecture.options),
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # a norm of ones, a bias of zeros would hide whether they are read
        for name, weight in model.named_parameters():
            if weight.dim() == 1 or "sinks" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
