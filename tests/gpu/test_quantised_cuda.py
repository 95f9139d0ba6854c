"""A model in int8 on a GPU: the very weights that a CPU serves under that name.

Written without a GPU at hand, so never run yet: figures are printed (`pytest -rP`) to be judged.
"""

# ruff: noqa: T201 - the figures are half of what these tests are for

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pinaivu_node.engine.model.linear import PackedLinear
from pinaivu_node.engine.model.quantised import Int8Embedding, Int8Linear, quantise_rows

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))
from solo import Solo, request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_computes_on_a_gpu_what_it_computes_on_a_cpu(dtype):
    torch.manual_seed(3)
    plain = nn.Linear(576, 1536).requires_grad_(requires_grad=False)
    here = quantise_rows(plain.weight)
    there = quantise_rows(plain.weight.cuda())
    assert torch.equal(here.values, there.values.cpu())
    x = torch.randn(16, 576)
    expected = PackedLinear([Int8Linear(here, plain.bias, dtype=torch.float32)])(x)
    layer = Int8Linear(there, plain.bias.cuda(), dtype=dtype)
    said = layer(x.cuda().to(dtype)).cpu().float()
    error = float((said - expected).norm() / expected.norm())
    print(f"{dtype}: off by {error:.1e}")
    assert error < {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]


def test_an_embedding_is_the_same_number_by_number():
    matrix = torch.randn(1000, 64)
    tokens = torch.tensor([[3, 999, 0]])
    here = Int8Embedding(quantise_rows(matrix), factor=8.0, dtype=torch.float32)(tokens)
    rows = quantise_rows(matrix.cuda())
    there = Int8Embedding(rows, factor=8.0, dtype=torch.float32)(tokens.cuda())
    assert torch.equal(here, there.cpu())


def test_a_model_in_int8_is_loaded_recorded_and_answers():
    from pinaivu_node.config import DATA_FOLDER
    from pinaivu_node.models.store import ModelStore

    folder = ModelStore(DATA_FOLDER / "models").resolve("smollm2:135m").folder
    prompt = "The capital of France is"
    for dtype in ("float32", "bfloat16"):
        before = torch.cuda.memory_allocated()
        solo = Solo(folder, device="cuda", dtype=dtype, quantization="int8", kv_cache_gb=0.5)
        [said] = solo.run(request(prompt, max_tokens=16))
        print(dtype, torch.cuda.memory_allocated() - before, "bytes", repr(said.text))
        assert "Paris" in said.text
