"""A transformers model made fast on a CPU: its layers replaced by equal ones with fewer operations.

Eager torch spends some 5 µs on each operation before it computes anything, and a decode step of a
small model has fifteen hundred.  Here a norm, a gated activation, a rotation and an attention are
one kernel each, and projections of the same input are one matrix.

No sum in any of these kernels depends on what else is in the batch, so neither does any logit, in
float32 and in bfloat16.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from pinaivu_node.engine import kernels
from pinaivu_node.engine.model.attention import Batch, Look
from pinaivu_node.engine.model.linear import PackedLinear
from pinaivu_node.engine.model.quantised import Int8Linear

_PLAIN_ATTENTION: Final = frozenset(
    f"{family}Attention"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "SmolLM3", "Phi3")
)
"""Attention classes whose forward is projections, optional norms of each head, rotation, attention
and projection: what `FusedAttention` does.  Others keep theirs."""
_WINDOW_OF_CONFIG: Final = frozenset({"MistralAttention", "Phi3Attention"})
"""Attention classes that know their sliding window from the model's configuration alone."""
_PLAIN_LAYERS: Final = frozenset(
    f"{family}DecoderLayer" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3")
)
"""Layer classes whose forward is what `FusedLayer` does; Gemma's have two norms more."""
_GATED: Final = {"SiLUActivation": "silu_gated", "SiLU": "silu_gated", "GELUTanh": "gelu_gated"}


class FusedNorm(nn.Module):
    """RMS norm: x / rms(x) · (offset + weight)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight: torch.Tensor = norm.weight  # type: ignore[assignment]
        self.weight = weight.detach().float()
        self.offset = 1.0 if _has_unit_offset(norm) else 0.0
        self.epsilon = _epsilon(norm)
        self._kernel = kernels.of(weight.dtype).rms_norm
        self._adding_kernel = kernels.of(weight.dtype).add_rms_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._kernel(
            x.data_ptr(), self.weight.data_ptr(), out.data_ptr(),
            x.numel() // width, width, self.epsilon, self.offset,
        )  # fmt: skip
        return out

    def of_sum(self, x: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        """The norm of x + addend, which x becomes; both dense."""
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._adding_kernel(
            x.data_ptr(), addend.data_ptr(), self.weight.data_ptr(), out.data_ptr(),
            x.numel() // width, width, self.epsilon, self.offset,
        )  # fmt: skip
        return out


class FusedMLP(nn.Module):
    """down(activation(gate(x)) · up(x))."""

    def __init__(self, gate_and_up: Any, down: Any, *, kernel: Any) -> None:
        super().__init__()
        self.gate_and_up = gate_and_up
        self.down = down
        self._kernel = kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, hidden] to the same."""
        both = self.gate_and_up.forward(x)
        width = both.shape[-1] // 2
        gated = both.new_empty(*both.shape[:-1], width)
        self._kernel(both.data_ptr(), gated.data_ptr(), both.numel() // (2 * width), width)
        product: torch.Tensor = self.down.forward(gated)
        return product


class FusedAttention(nn.Module):
    """Projection, norms of the heads, rotation, attention, projection."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.layer_idx = int(attention.layer_idx)
        self.width = int(attention.head_dim)
        if hasattr(attention, "qkv_proj"):
            self.project = PackedLinear([attention.qkv_proj])
        else:
            self.project = PackedLinear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = PackedLinear([attention.o_proj])
        self.query_heads = self.output.in_features // self.width
        self.heads = (self.project.out_features // self.width - self.query_heads) // 2
        window = getattr(attention, "sliding_window", None)
        if type(attention).__name__ in _WINDOW_OF_CONFIG:
            window = getattr(attention.config, "sliding_window", None)
        cap = getattr(attention, "attn_logit_softcapping", None)
        self.look = Look(float(attention.scaling), window or 0, cap or 0.0)
        self.turns = bool(getattr(attention, "use_rope", True))
        self._norms = (_head_norm(attention, "q_norm"), _head_norm(attention, "k_norm"))
        self._rotate = kernels.of(self.output.dtype).rotate
        self._norm = kernels.of(self.output.dtype).head_norm

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *,
        batch: Batch,
        **_unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """As transformers calls the class that this one replaces."""
        x = self.project.forward(hidden_states)[0]
        tokens, stride, width = len(x), x.shape[1], self.width
        heads = x.view(tokens, -1, width)
        first_key, first_value = self.query_heads, self.query_heads + self.heads
        query, key, value = (
            heads[:, :first_key],
            heads[:, first_key:first_value],
            heads[:, first_value:],
        )
        for part, norm in zip((query, key), self._norms, strict=True):
            if norm is not None:
                weight, epsilon, offset = norm
                self._norm(
                    part.data_ptr(), stride, tokens, part.shape[1], width,
                    weight.data_ptr(), epsilon, offset,
                )  # fmt: skip
        if self.turns:
            cosine, sine = position_embeddings
            self._rotate(
                x.data_ptr(), stride, tokens, first_value, width,
                cosine.data_ptr(), sine.data_ptr(), cosine.shape[-1],
            )  # fmt: skip
        attended = batch.cache.attend(
            self.layer_idx, query, key, value, batch=batch, look=self.look
        )
        return self.output.forward(attended[None]), None


class FusedLayer(nn.Module):
    """A pre-norm decoder layer: x += attention(norm(x)), then x += mlp(norm(x))."""

    def __init__(self, layer: Any) -> None:
        """Of a layer whose parts are fused already."""
        super().__init__()
        self.norm: FusedNorm = layer.input_layernorm
        self.attention: FusedAttention = layer.self_attn
        self.second_norm: FusedNorm = layer.post_attention_layernorm
        self.mlp: FusedMLP = layer.mlp

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        **_unused: Any,
    ) -> torch.Tensor:
        """As transformers calls the class that this one replaces; works in place."""
        # The parts' own forwards, past torch's hooks: those take longer than the smallest kernels.
        x = hidden_states
        attended, _ = self.attention.forward(self.norm.forward(x), position_embeddings, batch=batch)
        return x.add_(self.mlp.forward(self.second_norm.of_sum(x, attended)))


def fuse(model: nn.Module) -> None:
    """Replace what can be replaced in place; the model computes the same with fewer operations."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = _replacement(child)
            if replacement is not None:
                setattr(parent, name, replacement)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_plain_layer(child):
                setattr(parent, name, FusedLayer(child))
    # What was inside the replaced modules is gone; the rest are single linear layers.
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear or isinstance(child, Int8Linear):
                setattr(parent, name, PackedLinear([child]))


def _replacement(module: nn.Module) -> nn.Module | None:
    kind = type(module).__name__
    if kind in _PLAIN_ATTENTION:
        return FusedAttention(module)
    if kind.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
        return FusedNorm(module)
    if kind.endswith("MLP"):
        return _fused_mlp(module)
    return None


def _is_plain_layer(layer: Any) -> bool:
    if type(layer).__name__ not in _PLAIN_LAYERS:
        return False
    parts = (layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn, layer.mlp)
    return [type(part) for part in parts] == [FusedNorm, FusedNorm, FusedAttention, FusedMLP]


def _fused_mlp(mlp: Any) -> FusedMLP | None:
    activation = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    kernel = _GATED.get(type(activation).__name__)
    if kernel is None or not hasattr(mlp, "down_proj"):
        return None
    if hasattr(mlp, "gate_up_proj"):
        both = PackedLinear([mlp.gate_up_proj])
    elif hasattr(mlp, "gate_proj") and hasattr(mlp, "up_proj"):
        both = PackedLinear([mlp.gate_proj, mlp.up_proj])
    else:
        return None
    down = PackedLinear([mlp.down_proj])
    return FusedMLP(both, down, kernel=getattr(kernels.of(down.dtype), kernel))


def _head_norm(attention: Any, name: str) -> tuple[torch.Tensor, float, float] | None:
    norm = getattr(attention, name, None)
    if norm is None:
        return None
    return norm.weight.detach().float(), _epsilon(norm), 1.0 if _has_unit_offset(norm) else 0.0


def _epsilon(norm: Any) -> float:
    epsilon = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if epsilon is None else epsilon)


def _has_unit_offset(norm: nn.Module) -> bool:
    """Gemma's norms hold the weight's distance from one."""
    return type(norm).__name__.startswith("Gemma") and "4" not in type(norm).__name__
