"""Every fast path against its plain twin: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.convolution import RowsConv1d
from models.fused import linear, taps
from models.fused.grouped import GroupedConv1d
from tests.twins import doubles, drawn, same


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_linear_is_a_linear(shape, strided, onednn, monkeypatch):
    monkeypatch.setattr(linear, "FASTER", onednn and linear.AVAILABLE)
    torch.manual_seed(0)
    layer = linear.Linear(24, 40)
    x = torch.randn(*shape[:-1], 48)[..., ::2] if strided else torch.randn(shape)
    x = x.detach().requires_grad_()
    upstream = torch.randn(*shape[:-1], 40)
    twin = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    ours, plain = layer(x), F.linear(*twin)
    assert (ours.grad_fn.name() == "ProductBackward") == linear.FASTER
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(ours, (x, layer.weight, layer.bias), upstream)
    expected = torch.autograd.grad(plain, twin, upstream.double())
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5)


def test_linear_without_the_operator_and_in_other_precisions(monkeypatch):
    layer, x = linear.Linear(24, 40), torch.randn(7, 24)
    monkeypatch.setattr(linear, "FASTER", linear.AVAILABLE)
    fast = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert linear.Linear(24, 40).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    monkeypatch.setattr(linear, "FASTER", False)
    torch.testing.assert_close(layer(x), fast)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 0), (2, 2, 0), (9, 1, 4), (5, 3, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_by_taps(samples, kernel, stride, padding, bias):
    torch.manual_seed(0)
    conv = RowsConv1d(32, 40, kernel, stride, padding=padding, bias=bias)
    twin = nn.Conv1d(32, 40, kernel, stride, padding=padding, bias=bias).double()
    twin.load_state_dict(conv.state_dict())
    x = drawn(samples, 26, 32)
    (exact,) = doubles([x])
    ours, plain = conv(x), twin(exact.transpose(1, 2)).transpose(1, 2)
    assert ours.grad_fn.name() == "ConvolutionBackward"
    same(ours, (x, *conv.parameters()), plain, (exact, *twin.parameters()))


def test_convolution_by_taps_leaves_alone_what_it_is_not_for(monkeypatch):
    x = torch.randn(2, 20, 32)
    conv = RowsConv1d(32, 40, 3, 2)
    by_taps = conv(x)
    assert RowsConv1d(1, 40, 10, 5)(x[..., :1]).shape == (2, 3, 40)  # a waveform's one channel
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    monkeypatch.setattr(taps, "applicable", lambda conv, x: False)
    torch.testing.assert_close(conv(x), by_taps)


@pytest.mark.parametrize("settings", [{"dilation": 2}, {"padding_mode": "circular"}, {"padding": "same"}])
def test_convolutions_that_rows_are_not_for(settings):
    x = torch.randn(2, 20, 32)
    for conv in (
        RowsConv1d(32, 32, 3, **{"padding": 1} | settings),
        GroupedConv1d(32, 32, 3, groups=4, **{"padding": 1} | settings),
    ):
        plain = nn.Conv1d(32, 32, 3, groups=conv.groups, **{"padding": 1} | settings)
        plain.load_state_dict(conv.state_dict())
        ours = conv(x) if isinstance(conv, RowsConv1d) else conv(x.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(ours, plain(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_convolution_of_rows(stride):
    torch.manual_seed(0)
    conv = GroupedConv1d(32, 48, 7, stride, padding=3, groups=4)
    twin = nn.Conv1d(32, 48, 7, stride, padding=3, groups=4).double()
    twin.load_state_dict(conv.state_dict())
    x = drawn(3, 21, 32)
    (exact,) = doubles([x])
    ours, plain = conv(x.transpose(1, 2)), twin(exact.transpose(1, 2))
    same(ours, (x, *conv.parameters()), plain, (exact, *twin.parameters()))
