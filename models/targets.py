"""From the teacher's blocks to regression targets, and from predictions to losses: pure functions in fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import TargetConfig


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


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations per channel; two of them add up without cancellation."""

    n: Tensor  # (), how many
    mean: Tensor  # (D,)
    m2: Tensor  # (D,)


@torch.no_grad()
def moments(x: Tensor) -> Moments:
    """Moments of (..., D) over all but the last axis, in float64 so that ranks can be pooled exactly."""
    flat = x.detach().reshape(-1, x.shape[-1]).float()
    variance, mean = torch.var_mean(flat, dim=0, correction=0)
    n = torch.full((), flat.shape[0], dtype=torch.float64, device=x.device)  # no copy from the host
    return Moments(n, mean.double(), variance.double() * n)


def pool(a: Moments, b: Moments) -> Moments:
    """The moments of two sets taken together (Chan, Golub & LeVeque 1979)."""
    n = a.n + b.n
    delta = b.mean - a.mean
    return Moments(n, a.mean + delta * (b.n / n), a.m2 + b.m2 + delta**2 * (a.n * b.n / n))


def deviation(m: Moments) -> Tensor:
    """Mean over channels of sqrt(unbiased variance + 1e-6): what collapse is watched by (docs/method.md 1.10)."""
    return (m.m2 / (m.n - 1) + 1e-6).sqrt().mean()
