"""Dropout, residual and LayerNorm in one pass, and again in the backward one.

torch keeps the sum that it normalises and a mask of what it dropped, and goes over the rows three times; here they are
read once, and what was dropped is drawn again. The plain twin is torch's operators, which `models.encoder.Block` takes
where the kernels are not chosen. Not run on hardware: tested on the CPU, by Triton's interpreter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.fused import kernels


class Added(NamedTuple):
    """What becomes of f before it is added to x: all of it with probability 1 - `dropout`, by what `seed` draws, times
    each sample's `factor`, (N, 1, 1)."""

    dropout: float = 0.0
    seed: int = 0
    factor: Tensor | None = None

    @property
    def scale(self) -> float:
        """Of what is kept."""
        return 1 / (1 - self.dropout) if self.dropout < 1 else 0.0

    @property
    def same(self) -> bool:
        """f is added as it is."""
        return not self.dropout and self.factor is None


class ResidualNorm(nn.LayerNorm):
    """`nn.LayerNorm`: the same parameters, and without f the same function, by apex if that is asked for. A module, as
    ZeRO 3 gathers the weights of what is called."""

    def forward(self, x: Tensor, f: Tensor | None = None, dropout: float = 0.0, factor: Tensor | None = None) -> Tensor:
        """LayerNorm(x + f), by the kernel: (N, K, D), (N, K, D) -> (N, K, D). Of f the share `dropout` is left out and
        the rest makes up for it; the rest of each sample is multiplied by its `factor`, (N, 1, 1)."""
        if f is None:
            return apex_norm(x, self) if kernels.asked_for("norm", "apex") else super().forward(x)
        seed = kernels.draw_seed() if dropout else 0
        return residual_norm(x, f, self.weight, self.bias, self.eps, Added(dropout, seed, factor))


def residual_norm(x: Tensor, f: Tensor, weight: Tensor, bias: Tensor, eps: float, added: Added) -> Tensor:
    """LayerNorm over the last axis of x and what is `added` of f, both (N, K, D), in the type that torch's operators
    would give: the wider of the two, or `type_of_norm`'s. The sum is rounded to the wider one where it is saved.
    """
    if x.shape != f.shape:
        raise ValueError(f"what is added has the shape {tuple(f.shape)}; it must be that of x, {tuple(x.shape)}")
    saved = torch.is_grad_enabled() and any(t.requires_grad for t in (x, f, weight, bias))
    return ResidualNormed.apply(x, f, weight, bias, eps, added, saved)


def apex_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """NVIDIA apex's LayerNorm of x by the parameters of `norm`, in torch's type. Not run on hardware."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    x = x.to(type_of_norm(x, x.dtype))
    with torch.autocast(x.device.type, enabled=False):  # it would have it all in low precision
        return fused_layer_norm_affine(x, norm.weight, norm.bias, norm.weight.shape, norm.eps)


def type_of_norm(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What torch makes of `dtype` in a LayerNorm on the device of x: in fp32 by autocast on GPUs, as it is on CPUs."""
    return torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else dtype


class ResidualNormed(torch.autograd.Function):
    """Saves the sum, two statistics a row, and a seed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, f: Tensor, weight: Tensor, bias: Tensor, eps: float, added: Added, saved: bool
    ) -> Tensor:
        from models.fused import norm_kernels

        wide = torch.promote_types(x.dtype, f.dtype)
        ctx.types, ctx.added = (x.dtype, f.dtype), added
        x, f = x.contiguous(), f.contiguous()
        y = torch.empty_like(x, dtype=type_of_norm(x, wide))
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        total = torch.empty_like(x, dtype=wide) if saved else None
        moments = x.new_empty(2, rows, dtype=torch.float32) if saved else None
        columns, height, warps = norm_kernels.tile(width)
        norm_kernels.residual_norm_forward[(-(-rows // height),)](
            x, f, added.factor, weight, bias, y, total, moments, rows, rows // len(x), eps, added.dropout, added.scale,
            added.seed, WIDTH=width, DROPOUT=added.dropout > 0, ROWS=height, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(total, moments, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from models.fused import norm_kernels

        total, moments, weight = ctx.saved_tensors
        added, (of_x, of_f) = ctx.added, ctx.types
        rows, width = total.numel() // total.shape[-1], total.shape[-1]
        to_x = torch.empty_like(total, dtype=of_x)
        alike = added.same and of_x == of_f
        to_f = to_x if alike else torch.empty_like(total, dtype=of_f)
        columns, height, warps = norm_kernels.tile(width)
        programs = min(norm_kernels.PROGRAMS, -(-rows // height))
        to_weight, to_bias = total.new_empty(2, programs, width, dtype=torch.float32)
        norm_kernels.residual_norm_backward[(programs,)](
            grad.contiguous(), total, moments, added.factor, weight, to_x, None if alike else to_f, to_weight, to_bias,
            rows, rows // len(total), added.dropout, added.scale, added.seed,
            WIDTH=width, DROPOUT=added.dropout > 0, ROWS=height, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
        return to_x, to_f, to_weight.sum(0).to(weight.dtype), to_bias.sum(0).to(weight.dtype), None, None, None
