"""Weights in int8: near what they stand for, and as indifferent to company as any others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.kernels import amx
from pinaivu_node.engine.model import linear
from pinaivu_node.engine.model.embedding import EncoderModel
from pinaivu_node.engine.model.linear import PackedLinear
from pinaivu_node.engine.model.quantised import (
    Int8Embedding,
    Int8Linear,
    quantise,
    quantise_rows,
)
from pinaivu_node.engine.model.weights import LoadError

from .solo import Solo, request

SIZES = [(1, 1), (3, 5), (16, 64), (48, 64), (50, 33), (130, 96), (192, 577)]
ROWS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 32, 33, 64]


@pytest.fixture(params=["AMX", "no AMX"])
def unit(request, monkeypatch):
    if request.param == "AMX" and not amx.is_here():
        pytest.skip("this processor has no AMX")
    if request.param == "no AMX":
        monkeypatch.setattr(linear.amx, "is_here", lambda: False)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def layer(outputs: int, inputs: int, *, dtype=torch.float32, bias: bool = True) -> Int8Linear:
    torch.manual_seed(outputs * 1000 + inputs)
    plain = nn.Linear(inputs, outputs, bias=bias).requires_grad_(requires_grad=False)
    return Int8Linear(quantise_rows(plain.weight), plain.bias, dtype=dtype)


def test_a_row_is_the_nearest_that_int8_can_say():
    matrix = torch.randn(300, 1500) * torch.rand(300, 1) * 10
    rows = quantise_rows(matrix)
    assert rows.values.dtype is torch.int8
    error = (rows.as_float(torch.float32) - matrix).abs() / rows.scales[:, None]
    assert error.max() <= 0.5001
    assert torch.equal(rows.values.abs().amax(1), torch.full((300,), 127, dtype=torch.int8))


def test_a_row_of_zeros_stays_one_and_numbers_that_are_none_are_refused():
    assert not quantise_rows(torch.zeros(2, 5)).as_float(torch.float32).any()
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match="numbers that are none"):
            quantise_rows(torch.tensor([[1.0, 2.0], [1.0, bad]]))


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_right_and_a_row_does_not_depend_on_its_company(
    outputs, inputs, dtype, unit, threads
):
    quantised = layer(outputs, inputs, dtype=dtype, bias=outputs % 2 == 0)
    packed = PackedLinear([quantised])
    assert packed.dtype is dtype
    x = torch.randn(max(ROWS), inputs).to(dtype)
    alone = torch.cat([packed(x[row : row + 1]) for row in range(len(x))])
    for rows in ROWS:
        assert torch.equal(packed(x[:rows]), alone[:rows])
        assert torch.equal(packed(x[-rows:]), alone[-rows:])
    weight = quantised.rows.values.double() * quantised.rows.scales[:, None]
    exact = x.double() @ weight.T + (0 if quantised.bias is None else quantised.bias.double())
    # Half of the last of sixteen bits of the row's largest, and the rounding of the result.
    step = x.double().abs().amax(1, keepdim=True) / 65_000 * weight.abs().sum(1)
    digits = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-20
    assert ((alone.double() - exact).abs() <= step + digits * (exact.abs() + 1)).all()


def test_a_large_number_in_a_row_leaves_eight_bits_to_the_others(unit):
    quantised = layer(64, 576, bias=False)
    x = torch.randn(4, 576)
    x[:, 17] = 250.0
    others = torch.ones(576)
    others[17] = 0
    weight = quantised.rows.as_float(torch.float32)
    product = PackedLinear([quantised])(x) - 250.0 * weight[:, 17]
    exact = (x * others) @ weight.T
    assert (product - exact).norm() / exact.norm() < 2.0**-7


def test_layers_side_by_side_are_one(unit):
    layers = [layer(48, 64), layer(20, 64, bias=False)]
    x = torch.randn(2, 3, 64)
    both = PackedLinear(layers)(x)
    assert both.shape == (2, 3, 68)
    assert torch.equal(both[..., :48], PackedLinear(layers[:1])(x))
    assert torch.equal(both[..., 48:], PackedLinear(layers[1:])(x))


def test_numbers_that_are_none_stay_in_their_row(unit):
    packed = PackedLinear([layer(130, 96)])
    x = torch.randn(20, 96)
    clean = packed(x)
    x[7, 3], x[9, 5] = float("nan"), float("inf")
    dirty = packed(x)
    assert dirty[7].isnan().all()
    assert not dirty[9].isfinite().any()
    kept = [row for row in range(20) if row not in {7, 9}]
    assert torch.equal(dirty[kept], clean[kept])


def test_a_row_of_zeros_gives_the_bias(unit):
    quantised = layer(130, 96)
    torch.testing.assert_close(PackedLinear([quantised])(torch.zeros(1, 96))[0], quantised.bias)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_quantised_in_place_with_its_ends(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    ids = torch.arange(50)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits.float()
        quantise(model, dtype=torch.float32)
        after = model(input_ids=ids).logits
    assert model.dtype is torch.float32
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, Int8Embedding)
    assert isinstance(head, Int8Linear)
    assert (embedding.rows is head.rows) == tied
    assert not [each for each in model.modules() if type(each) in {nn.Linear, nn.Embedding}]
    assert (after - before).norm() / before.norm() < 0.05


def test_a_quantised_model_says_the_same_alone_in_company_and_in_chunks(tiny_model):
    prompts = [tuple(range(5, 5 + length)) for length in (3, 17, 40, 64, 90)]
    requests = [
        request(prompt, id=str(n), logprobs=1, temperature=0.8, seed=n)
        for n, prompt in enumerate(prompts)
    ]
    alone = Solo(tiny_model, quantization="int8", prefill_chunk=512)
    expected = [alone.run(each)[0] for each in requests]
    together = Solo(tiny_model, quantization="int8", prefill_chunk=16)
    for heard, said in zip(together.run(*requests), expected, strict=True):
        assert heard.token_ids == said.token_ids
        assert heard.logprobs == said.logprobs


def test_a_quantised_model_computes_in_the_format_that_was_asked_for(tiny_model):
    solo = Solo(tiny_model, quantization="int8", dtype="bfloat16")
    assert solo.model.dtype is torch.bfloat16
    [said] = solo.run(request((5, 6, 7)))
    assert len(said.token_ids) > 0


def test_what_cannot_be_had_in_int8_is_refused(tiny_model):
    config = EngineConfig(model=tiny_model, device="cpu", quantization="int8")
    with pytest.raises(LoadError, match="not made in int8"):
        EncoderModel.load(config)


def test_a_model_with_damaged_weights_is_refused(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="numbers that are none"):
        Solo(tmp_path, quantization="int8")
