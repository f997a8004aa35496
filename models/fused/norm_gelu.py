"""LayerNorm over channels, exact (erf) GELU and residual in one pass, as they follow a convolution.

torch keeps what it normalises, what it made of it, and what GELU made of that; here the first alone, with two
statistics a row. The plain twin is torch's operators. Not run on hardware: tested on the CPU, by Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.fused import kernels
from models.fused.norm import type_of_norm


class NormGelu(nn.LayerNorm):
    """`nn.LayerNorm`, the same parameters, with a GELU behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return norm_gelu(x, self.weight, self.bias, eps=self.eps)


def norm_gelu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """residual + GELU(LayerNorm(x)) over the last axis, with an affine weight and bias (C,) or without both:
    (N, T, C) -> (N, T, C). In the type that torch's operators would give: the wider of residual's and
    `type_of_norm`'s."""
    if not kernels.triton("convolution", x):
        y = F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, eps))
        return y if residual is None else residual + y
    saved = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return NormedGelu.apply(x, weight, bias, residual, eps, saved)


class NormedGelu(torch.autograd.Function):
    """Saves x and two statistics a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        saved: bool,
    ) -> Tensor:
        from models.fused import norm_kernels

        wide = type_of_norm(x, x.dtype)
        ctx.of_residual = None
        if residual is not None:
            wide, ctx.of_residual = torch.promote_types(wide, residual.dtype), residual.dtype
            residual = residual.contiguous()
        x = x.contiguous()
        y = torch.empty_like(x, dtype=wide)
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        moments = x.new_empty(2, rows, dtype=torch.float32) if saved else None
        columns, height, warps = norm_kernels.tile(width)
        norm_kernels.norm_gelu_forward[(-(-rows // height),)](
            x, residual, weight, bias, y, moments, rows, eps,
            WIDTH=width, ROWS=height, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
        if saved:
            ctx.save_for_backward(x, moments, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_residual = None if ctx.of_residual is None else grad.to(ctx.of_residual)
        saved = ctx.saved_tensors
        if not saved:
            return None, None, None, to_residual, None, None
        from models.fused import norm_kernels

        x, moments, weight, bias = saved
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        to_x = torch.empty_like(x)
        columns, height, warps = norm_kernels.tile(width)
        programs = -(-rows // height)
        to_weight = to_bias = None
        if weight is not None:
            programs = min(norm_kernels.PROGRAMS, programs)
            to_weight, to_bias = x.new_empty(2, programs, width, dtype=torch.float32)
        norm_kernels.norm_gelu_backward[(programs,)](
            grad.contiguous(), x, moments, weight, bias, to_x, to_weight, to_bias, rows,
            WIDTH=width, ROWS=height, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
        if to_weight is not None and to_bias is not None:
            to_weight, to_bias = to_weight.sum(0).to(weight.dtype), to_bias.sum(0).to(bias.dtype)
        return to_x, to_weight, to_bias, to_residual, None, None
