"""Attention whose logits get a bias, or whose weights are dropped out, in memory that does not grow with the rows.

torch's fused kernels take no such bias with a gradient for its scale, and on the CPU no dropout; what they fall back to
keeps several (N, H, K, K) tensors a block. On GPUs kernels of ours take over, `flash.py`. Elsewhere, and without
Triton, logits, weights and what is dropped of them exist for a few rows at a time, forward and again backward. The
plain twin of both is `plain_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.alibi import distances
from models.fused import kernels

LEAST = torch.finfo(torch.float32).min  # unlike -inf, a row that sees nothing but padding stays finite
STREAM = 0x9E3779B97F4A7C15 >> 2  # far apart: pieces of rows use the seeds that follow the first
LOGITS = {"cpu": 2**20, "cuda": 2**26}  # how many at a time, or those of one row; on the CPU they stay in the cache


@dataclass(frozen=True, eq=False)
class Bias:
    """logits[n, h, i, j] += slope[h] * |positions[n, i] - positions[n, j]|, and `LEAST` where key j is padding. Shared
    by all heads, blocks and, with a first axis of 1, rows: nothing of size (N, H, K, K) is ever made of it."""

    slope: Tensor | None = None  # (H,) fp32
    positions: Tensor | None = None  # (N or 1, K) where what is kept was
    padding: Tensor | None = None  # (N, K) bool

    @cached_property
    def distance(self) -> Tensor | None:
        """(N or 1, K, K) fp32, made for the first block that asks."""
        return None if self.positions is None else distances(self.positions)


def attention(qkv: Tensor, bias: Bias | None = None, dropout: float = 0.0, stream: int | None = None) -> Tensor:
    """Softmax attention of (N, K, 3, H, W) -> (N, K, H*W). Logits are scaled by W^-0.5, bias and softmax fp32.

    What is dropped is drawn from one of many streams: ranks whose generators agree draw differently in their own, and
    their generators agree afterwards. The two implementations draw differently.
    """
    if bias is None and not dropout:
        return unbiased_attention(qkv)
    if bias is None and stream is None and qkv.is_cuda and not kernels.asked_for("attention"):
        return unbiased_attention(qkv, dropout)
    seed = kernels.draw_seed() if dropout else 0
    if stream is not None:
        seed = (seed + stream * STREAM) % 2**62
    bias = bias or Bias()
    if kernels.triton("attention", qkv):
        from models.fused.flash import FlashAttention  # Triton may be missing, and takes long to import

        return FlashAttention.apply(qkv, bias.slope, bias.positions, bias.padding, dropout, seed)
    return BiasedAttention.apply(qkv, bias.slope, bias.distance, bias.padding, dropout, seed)


def unbiased_attention(qkv: Tensor, dropout: float = 0.0) -> Tensor:
    """torch's fused attention."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


def plain_attention(qkv: Tensor, bias: Bias | None = None) -> Tensor:
    """The same without dropout, in one piece: what the fused ones are tested against, in float64 if qkv is."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    logits = logits.to(torch.promote_types(q.dtype, torch.float32))
    if bias is not None and bias.slope is not None and bias.distance is not None:
        logits = logits + bias.slope[:, None, None] * bias.distance[:, None]
    if bias is not None and bias.padding is not None:
        logits = logits.masked_fill(bias.padding[:, None, None], LEAST)
    return (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


class BiasedAttention(torch.autograd.Function):
    """Saves qkv and a seed; weights, and what is dropped of them, are computed anew in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        slope: Tensor | None,
        distance: Tensor | None,
        padding: Tensor | None,
        dropout: float,
        seed: int,
    ) -> Tensor:
        n, t, _, heads, width = qkv.shape
        out = qkv.new_empty(n, t, heads, width)
        with torch.autocast(qkv.device.type, enabled=False):
            for rows in _pieces(qkv):
                _, _, v = _heads_first(qkv[rows])
                weights = _weights(qkv, rows, slope, distance, padding)
                if dropout:
                    weights.mul_(_kept(weights, dropout, seed + rows.start))
                mixed = torch.bmm(weights.to(v.dtype), v).view(-1, heads, t, width)
                out[rows].copy_(mixed.transpose(1, 2))
        ctx.save_for_backward(qkv, slope, distance, padding)
        ctx.dropout, ctx.seed = dropout, seed
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, slope, distance, padding = ctx.saved_tensors
        n, t, _, heads, width = qkv.shape
        scale = width**-0.5
        grad = grad.reshape(n, t, heads, width)
        to_qkv = torch.empty_like(qkv)
        to_slope = torch.zeros_like(slope) if ctx.needs_input_grad[1] else None
        for rows in _pieces(qkv):
            q, k, v = _heads_first(qkv[rows])
            g = grad[rows].transpose(1, 2).reshape(-1, t, width)
            weights = _weights(qkv, rows, slope, distance, padding)
            to_weights = torch.bmm(g, v.transpose(1, 2)).float()
            dropped = weights
            if ctx.dropout:
                factor = _kept(weights, ctx.dropout, ctx.seed + rows.start)
                dropped = weights * factor
                to_weights.mul_(factor)
            to_v = torch.bmm(dropped.to(g.dtype).transpose(1, 2), g)
            to_logits = torch._softmax_backward_data(to_weights, weights, -1, torch.float32)
            if padding is not None:  # whose weights are not zero where there is nothing else to see
                to_logits.view(-1, heads, t, t).masked_fill_(padding[rows, None, None], 0)
            if to_slope is not None:
                by_row = to_logits.view(-1, heads, t * t)
                far = distance[rows if len(distance) > 1 else slice(None)].view(-1, 1, t * t)
                to_slope += (by_row @ far.transpose(1, 2)).sum((0, 2))
            low = to_logits.to(q.dtype)
            to_q = torch.bmm(low, k).mul_(scale)
            to_k = torch.bmm(low.transpose(1, 2), q).mul_(scale)
            for i, part in enumerate((to_q, to_k, to_v)):
                to_qkv[rows, :, i].copy_(part.view(-1, heads, t, width).transpose(1, 2))
        return to_qkv, to_slope, None, None, None, None


def _pieces(qkv: Tensor) -> list[slice]:
    n, t, _, heads, _ = qkv.shape
    size = max(1, LOGITS.get(qkv.device.type, 2**26) // (heads * t * t))
    return [slice(first, min(n, first + size)) for first in range(0, n, size)]


def _kept(weights: Tensor, dropout: float, seed: int) -> Tensor:
    """What to multiply weights by: 0 with probability `dropout`, else what makes up for it."""
    generator = torch.Generator(weights.device).manual_seed(seed)
    return torch.empty_like(weights).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def _heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R, K, 3, H, W) -> three of (R*H, K, W); views for a single row."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)
    return q, k, v


def _weights(qkv: Tensor, rows: slice, slope: Tensor | None, distance: Tensor | None, padding: Tensor | None) -> Tensor:
    """Attention's weights of some rows, (R*H, K, K) fp32."""
    q, k, _ = _heads_first(qkv[rows])
    heads, t, width = qkv.shape[3], qkv.shape[1], qkv.shape[4]
    if slope is not None and distance is not None:
        near = distance[rows if len(distance) > 1 else slice(None)]
        bias = (slope[:, None, None] * near[:, None]).expand(rows.stop - rows.start, -1, -1, -1)
        if q.dtype == torch.float32:
            flat = bias.reshape(-1, t, t)
            logits = torch.baddbmm(flat, q, k.transpose(1, 2), alpha=width**-0.5, out=flat)
        else:
            logits = (torch.bmm(q, k.transpose(1, 2)) * width**-0.5).float().add_(bias.reshape(-1, t, t))
    else:
        logits = (torch.bmm(q, k.transpose(1, 2)) * width**-0.5).float()
    if padding is not None:
        logits.view(-1, heads, t, t).masked_fill_(padding[rows, None, None], LEAST)
    return torch.softmax(logits, -1, out=logits)
