"""The kernels of linear layers: right, and each row the same whatever is computed with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pinaivu_node.engine.kernels import amx
from pinaivu_node.engine.model import linear
from pinaivu_node.engine.model.linear import PackedLinear

SIZES = [(1, 1), (3, 5), (16, 16), (48, 64), (50, 33), (130, 96), (192, 577)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65]


def layer(outputs: int, inputs: int, *, dtype: torch.dtype, bias: bool) -> nn.Linear:
    torch.manual_seed(outputs * 1000 + inputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(requires_grad=False)


@pytest.fixture(params=["one thread", "two threads"], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one thread" else 2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["float32", "bfloat16", "bfloat16 without AMX"])
def dtype(request, monkeypatch) -> torch.dtype:
    if request.param == "bfloat16" and not amx.is_here():
        pytest.skip("this processor has no AMX")
    if request.param.endswith("AMX"):
        monkeypatch.setattr(linear.amx, "is_here", lambda: False)
    return getattr(torch, request.param.split()[0])


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_right_and_a_row_does_not_depend_on_its_company(
    outputs, inputs, bias, dtype
):
    plain = layer(outputs, inputs, dtype=dtype, bias=bias)
    packed = PackedLinear([plain])
    x = torch.randn(max(ROWS), inputs).to(dtype)
    alone = torch.cat([packed(x[row : row + 1]) for row in range(len(x))])
    for rows in ROWS:
        assert torch.equal(packed(x[:rows]), alone[:rows])
        assert torch.equal(packed(x[-rows:]), alone[-rows:])
    exact = x.double() @ plain.weight.double().T + (plain.bias.double() if bias else 0)
    scale = x.double().abs() @ plain.weight.double().abs().T + 1
    digits = 2.0**-23 if dtype is torch.float32 else 2.0**-8
    # Half a unit for rounding the result, and what some hundred additions in float32 leave.
    assert ((alone.double() - exact).abs() / scale).max() < max(0.6 * digits, 2.0**-20)


def test_layers_side_by_side_are_one(dtype):
    layers = [layer(48, 64, dtype=dtype, bias=True), layer(20, 64, dtype=dtype, bias=False)]
    x = torch.randn(2, 3, 64).to(dtype)
    both = PackedLinear(layers)(x)
    assert both.shape == (2, 3, 68)
    assert torch.equal(both[..., :48], PackedLinear(layers[:1])(x))
    assert torch.equal(both[..., 48:], PackedLinear(layers[1:])(x))


def test_numbers_that_are_none_stay_in_their_row(dtype):
    packed = PackedLinear([layer(130, 96, dtype=dtype, bias=True)])
    x = torch.randn(20, 96).to(dtype)
    clean = packed(x)
    x[7, 3], x[9, 5] = float("nan"), float("inf")
    dirty = packed(x)
    assert dirty[7].isnan().all()
    assert not dirty[9].isfinite().any()
    kept = [row for row in range(20) if row not in {7, 9}]
    assert torch.equal(dirty[kept], clean[kept])
