"""From the teacher's blocks to regression targets, and from predictions to losses: pure functions in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import TargetConfig
from models.fused import kernels
from models.masks import gather_rows


def mean_target(blocks: Iterable[Tensor], config: TargetConfig) -> Tensor:
    """MLP outputs (B, T, D) of the teacher's top blocks, of which none is kept -> targets (B, T, D) in fp32: each
    normalised, averaged, and normalised again (docs/method.md 1.5)."""
    total: Tensor | None = None
    for ffn in blocks:
        if kernels.triton("targets", ffn):
            from models.fused.targets import add_layer

            total = add_layer(total, ffn, config)
        else:
            layer = normalise_layer(ffn, config)
            total = layer if total is None else total.add_(layer)
    assert total is not None
    if kernels.triton("targets", total):
        from models.fused.targets import finish

        return finish(total, config)
    return normalise_mean(total / config.top_k_layers, config)


def normalise_layer(ffn: Tensor, config: TargetConfig) -> Tensor:
    """One block's target (B, T, D), normalised by itself before the mean over blocks is taken."""
    ffn = ffn.float()
    if config.instance_norm_layer:
        ffn = instance_norm(ffn)
    if config.layer_norm_layer:
        ffn = F.layer_norm(ffn, ffn.shape[-1:])
    return ffn


def normalise_mean(mean: Tensor, config: TargetConfig) -> Tensor:
    """The mean over blocks (B, T, D), normalised once more."""
    if config.layer_norm:
        mean = F.layer_norm(mean, mean.shape[-1:])
    if config.instance_norm:
        mean = instance_norm(mean)
    return mean


def instance_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean 0 and (biased) variance 1 over time, per sample and channel. (B, T, D) -> (B, T, D)."""
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    return (x - mean) * (variance + eps).rsqrt()


def summed_loss(prediction: Tensor, target: Tensor, beta: float, scale: float) -> Tensor:
    """Squared error, or smooth-L1 for beta > 0, times `scale`, summed over everything (docs/method.md 1.6)."""
    prediction, target = prediction.float(), target.float()
    if beta > 0:
        return F.smooth_l1_loss(prediction, target, beta=beta, reduction="sum") * scale
    return F.mse_loss(prediction, target, reduction="sum") * scale


def regression(
    prediction: Tensor, targets: Tensor, ids_mask: Tensor, beta: float, scale: float
) -> tuple[Tensor, Moments, Moments]:
    """Predictions (N, P, D) for the hidden positions `ids_mask` (N, P) of targets (B, T, D) -> `summed_loss`, and the
    moments of predictions and of what they should have been."""
    if kernels.triton("loss", prediction):
        from models.fused.loss import regression_loss

        loss, n, mean, m2 = regression_loss(prediction, targets, ids_mask, beta, scale)
        return loss, Moments(n, mean[0], m2[0]), Moments(n, mean[1], m2[1])
    target = gather_rows(targets, ids_mask)
    return summed_loss(prediction, target, beta, scale), moments(prediction), moments(target)


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations per channel; two of them add up without cancellation."""

    n: Tensor  # (), how many
    mean: Tensor  # (D,)
    m2: Tensor  # (D,)


@torch.no_grad()
def moments(x: Tensor) -> Moments:
    """Moments of (..., D) over all but the last axis, in float64 so that ranks can be pooled exactly."""
    flat = x.detach().reshape(-1, x.shape[-1]).float()
    if x.is_cuda:
        variance, mean = torch.var_mean(flat, dim=0, correction=0)
        m2 = variance.double() * len(flat)
    else:  # where that takes three times as long
        mean = flat.mean(0)
        m2 = (flat - mean).square_().sum(0)
    n = torch.full((), flat.shape[0], dtype=torch.float64, device=x.device)  # no copy from the host
    return Moments(n, mean.double(), m2.double())


def pool(a: Moments, b: Moments) -> Moments:
    """The moments of two sets taken together (Chan, Golub & LeVeque 1979)."""
    n = a.n + b.n
    delta = b.mean - a.mean
    return Moments(n, a.mean + delta * (b.n / n), a.m2 + b.m2 + delta**2 * (a.n * b.n / n))


def deviation(m: Moments) -> Tensor:
    """Mean over channels of sqrt(unbiased variance + 1e-6): what collapse is watched by (docs/method.md 1.10)."""
    return (m.m2 / (m.n - 1) + 1e-6).sqrt().mean()
