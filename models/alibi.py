"""Attention with linear biases (Press, Smith & Lewis 2022), symmetric and with a learned scale a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.fused.attention import Bias


class Alibi(nn.Module):
    """-slope_h * max(scale_h, 0) * |i - j| over the original positions i, j of kept frames (docs/method.md 1.3)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads))
        self.slopes = slopes(heads)  # not a buffer: an engine that casts the module to bf16 would round it

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Bias:
        """The bias between positions `ids` (N or 1, K), the same for all blocks; `padding` (N, K) marks dead keys."""
        self.slopes = self.slopes.to(self.scale.device)  # moves once
        slope = -self.slopes * self.scale.float().clamp(min=0)
        ids = ids.float()
        return Bias(slope, (ids[:, :, None] - ids[:, None, :]).abs_(), padding)


def slopes(heads: int) -> Tensor:
    """(H,) the geometric series of the paper; where H is no power of two, that of the power below it and then every
    other slope of twice that power."""
    power = 2 ** (heads.bit_length() - 1)
    ratio = 2 ** (-8 / power)
    series = [ratio ** (i + 1) for i in range(power)]
    between = [ratio ** (i + 0.5) for i in range(heads - power)]
    return torch.tensor(series + between)
