"""Transformer blocks as data2vec 2.0 uses them: post-norm, the regression target being the raw MLP output."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.fused import kernels
from models.fused.attention import Bias, attention
from models.fused.linear import Linear
from models.fused.norm import ResidualNorm


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection. (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_width, self.dropout = heads, width // heads, dropout
        self.stream: int | None = None  # where ranks share the heads, the one that this rank draws dropout from
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, bias: Bias | None) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_width)
        return self.proj(attention(qkv, bias, self.dropout if self.training else 0.0, self.stream))


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, dropout, Linear."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): while training, all of a sample is zero with probability `rate`, and what
    is left makes up for it. (N, K, D) -> (N, K, D)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor(x)
        return x if factor is None else x * factor

    def factor(self, x: Tensor) -> Tensor | None:
        """What to multiply samples by, (N, 1, 1); None where they all stay as they are."""
        if not (self.training and self.rate):
            return None
        return x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate).div_(1 - self.rate)


class Block(nn.Module):
    """A post-norm block. Returns its output and, before dropout and residual, the MLP output that targets are made
    of. `path` is the probability that a sample goes past its attention, and past its MLP."""

    def __init__(self, config: ModelConfig, path: float = 0.0) -> None:
        super().__init__()
        width, dropout = config.width, config.dropout
        self.attn = Attention(width, config.heads, dropout.attention)
        self.norm1 = ResidualNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), dropout.activation)
        self.norm2 = ResidualNorm(width, eps=config.norm_eps)
        self.attn_dropout, self.mlp_dropout = nn.Dropout(dropout.residual), nn.Dropout(dropout.mlp)
        self.drop_path = DropPath(path)

    def forward(self, x: Tensor, bias: Bias | None = None) -> tuple[Tensor, Tensor]:
        x = self.add(x, self.attn(x, bias), self.attn_dropout, self.norm1)
        ffn = self.mlp(x)
        return self.add(x, ffn, self.mlp_dropout, self.norm2), ffn

    def add(self, x: Tensor, f: Tensor, dropout: nn.Dropout, norm: ResidualNorm) -> Tensor:
        """norm(x + f) of two (N, K, D), where dropout and drop path have had f; in one kernel where that is chosen."""
        if kernels.triton("norm", f):
            return norm(x, f, dropout.p if dropout.training else 0.0, self.drop_path.factor(f))
        return norm(x + self.drop_path(dropout(f)))


def init_linear(module: nn.Module) -> None:
    """N(0, 0.02) weights and zero biases for every Linear below `module` (docs/method.md 2)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=0.02)
            nn.init.zeros_(child.bias)
