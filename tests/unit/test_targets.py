"""Targets and losses against float64 formulas written out or taken from torch."""

import functools

import pytest
import torch
import torch.nn.functional as F

from models.config import TargetConfig
from models.targets import deviation, instance_norm, moments, normalise_layer, normalise_mean, pool, summed_loss

OFF = dict.fromkeys(("instance_norm_layer", "layer_norm_layer", "layer_norm", "instance_norm"), False)


def values(*shape, mean=0.0, seed=0):
    """Scales and offsets differ between samples, times and channels, so that no two axes can be confused."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    for axis in range(len(shape)):
        gain = torch.rand(shape[axis], generator=generator, dtype=torch.float64) + 0.5
        x = x * gain.view([-1 if i == axis else 1 for i in range(len(shape))])
    return x + mean + torch.randn(shape[-1], generator=generator, dtype=torch.float64)


def reference_instance_norm(x):
    return F.instance_norm(x.transpose(1, 2)).transpose(1, 2)


def test_instance_norm_is_over_time():
    x = values(3, 50, 8)
    torch.testing.assert_close(instance_norm(x), reference_instance_norm(x), rtol=1e-12, atol=1e-12)


def test_instance_norm_survives_a_large_mean():
    x = values(2, 196, 8, mean=1000.0).float()
    torch.testing.assert_close(instance_norm(x).double(), reference_instance_norm(x.double()), rtol=0, atol=2e-4)


@pytest.mark.parametrize("switch", ["instance_norm_layer", "layer_norm_layer", None])
def test_each_block_is_normalised_as_configured(switch):
    x = values(2, 20, 8)
    expected = {
        "instance_norm_layer": reference_instance_norm,
        "layer_norm_layer": lambda x: F.layer_norm(x, (8,)),
        None: lambda x: x,
    }[switch](x)
    out = normalise_layer(x.bfloat16(), TargetConfig(**OFF | ({switch: True} if switch else {})))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.04)  # of bf16's input
    out = normalise_layer(x.float(), TargetConfig(**OFF | ({switch: True} if switch else {})))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_mean_is_normalised_over_channels_first_and_then_over_time():
    x = values(2, 20, 8)
    layer, both = F.layer_norm(x, (8,)), reference_instance_norm(F.layer_norm(x, (8,)))
    cases = {(False, False): x, (True, False): layer, (False, True): reference_instance_norm(x), (True, True): both}
    for (by_layer, by_instance), expected in cases.items():
        config = TargetConfig(**OFF | {"layer_norm": by_layer, "instance_norm": by_instance})
        torch.testing.assert_close(normalise_mean(x, config), expected, rtol=1e-12, atol=1e-12)
    assert (both - F.layer_norm(reference_instance_norm(x), (8,))).abs().max() > 0.1  # the other order is another one


@pytest.mark.parametrize("beta", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_sum_over_everything(beta, dtype):
    prediction, target = values(4, 30, 8).to(dtype), 3 * values(4, 30, 8, seed=1).float()
    d = prediction.double() - target.double()
    small = d.abs() < beta
    assert not beta or 0.05 < small.double().mean() < 0.95  # both branches are there
    each = torch.where(small, d**2 / (2 * beta), d.abs() - beta / 2) if beta else d**2
    loss = summed_loss(prediction, target, beta, 0.125)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert float(loss) == pytest.approx(0.125 * float(each.sum()), rel=1e-5)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_pooled_deviation_is_that_of_all_values_together(mean):
    """Parts of unlike sizes and means; at 10,000 a sum of squares in fp32 would have lost the variance."""
    parts = [values(n, 7, 8, mean=mean + n, seed=n).float() for n in (1, 5, 30)]
    everything = torch.cat([part.reshape(-1, 8) for part in parts]).double()
    pooled = functools.reduce(pool, map(moments, parts))
    assert float(pooled.n) == len(everything)
    torch.testing.assert_close(pooled.mean, everything.mean(0), rtol=1e-6, atol=1e-6)
    variance = everything.var(0)
    torch.testing.assert_close(pooled.m2 / (pooled.n - 1), variance, rtol=1e-4, atol=0)
    assert float(deviation(pooled)) == pytest.approx(float((variance + 1e-6).sqrt().mean()), rel=1e-5)


def test_pooling_does_not_depend_on_the_order():
    a, b, c = (moments(values(n, 8, seed=n)) for n in (3, 20, 100))
    for left, right in zip(pool(pool(a, b), c), pool(c, pool(b, a)), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_deviation_of_a_collapsed_channel_is_the_floor():
    assert float(deviation(moments(torch.full((10, 4), 3.0)))) == pytest.approx(1e-3)
