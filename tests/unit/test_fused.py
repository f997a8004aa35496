"""Every fast path against its plain twin: values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from models.fused import linear


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("strided", [False, True])
def test_linear_is_a_linear(shape, strided):
    torch.manual_seed(0)
    layer = linear.Linear(24, 40)
    x = torch.randn(*shape[:-1], 48)[..., ::2] if strided else torch.randn(shape)
    x = x.detach().requires_grad_()
    upstream = torch.randn(*shape[:-1], 40)
    twin = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    ours, plain = layer(x), F.linear(*twin)
    assert ours.grad_fn.name() == "ProductBackward" or not linear.AVAILABLE
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(ours, (x, layer.weight, layer.bias), upstream)
    expected = torch.autograd.grad(plain, twin, upstream.double())
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5)


def test_linear_without_the_operator_and_in_other_precisions(monkeypatch):
    layer, x = linear.Linear(24, 40), torch.randn(7, 24)
    fast = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert linear.Linear(24, 40).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    monkeypatch.setattr(linear, "AVAILABLE", False)
    torch.testing.assert_close(layer(x), fast)
