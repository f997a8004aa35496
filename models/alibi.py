"""Attention with linear biases (Press, Smith & Lewis 2022), symmetric and with a learned scale a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Alibi(nn.Module):
    """What logits get for every position of distance: -slope_h * max(scale_h, 0) (docs/method.md 1.3). A tensor and
    nothing else, for ZeRO 3 finds the way back to a module by the tensors that it returns."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads))
        self.slopes = slopes(heads)  # not a buffer: an engine that casts the module to bf16 would round it

    def forward(self) -> Tensor:
        """(H,) fp32, the same for all blocks."""
        self.slopes = self.slopes.to(self.scale.device)  # moves once
        return -self.slopes * self.scale.float().clamp(min=0)


def distances(ids: Tensor) -> Tensor:
    """|i - j| of the original positions `ids` (N or 1, K) of kept frames -> (N or 1, K, K) fp32."""
    ids = ids.float()
    return (ids[:, :, None] - ids[:, None, :]).abs_()


def slopes(heads: int) -> Tensor:
    """(H,) the geometric series of the paper; where H is no power of two, that of the power below it and then every
    other slope of twice that power."""
    power = 2 ** (heads.bit_length() - 1)
    ratio = 2 ** (-8 / power)
    series = [ratio ** (i + 1) for i in range(power)]
    between = [ratio ** (i + 0.5) for i in range(heads - power)]
    return torch.tensor(series + between)
