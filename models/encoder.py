"""Transformer blocks as data2vec 2.0 uses them: post-norm, the regression target being the raw MLP output."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.fused.linear import Linear


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection. (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A post-norm block. Returns its output and, before the residual, the MLP output that targets are made of."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm1(x + self.attn(x))
        ffn = self.mlp(x)
        return self.norm2(x + ffn), ffn


def init_linear(module: nn.Module) -> None:
    """N(0, 0.02) weights and zero biases for every Linear below `module` (docs/method.md 2)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=0.02)
            nn.init.zeros_(child.bias)
