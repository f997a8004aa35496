"""The regression loss with the moments of both its sides, in one pass, in Triton: `models.targets` has the plain twin.

Targets are read where they lie, once a sample; their copy for every mask is never made. Sums are kept a program and
added up in a fixed order, so that a step repeats bit for bit. The gradient is computed anew in the backward pass, from
what is kept anyway, and rounded once. Compiled and run through Triton's interpreter; not run on hardware. Imported only
where Triton is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.fused.moments import pool_tile

ROWS, CHANNELS = 32, 64  # a tile
CHUNK = 256  # rows of a program of the forward pass


class RegressionLoss(torch.autograd.Function):
    """Prediction (N, P, D), targets (B, T, D) fp32 and ids (N, P) -> loss () and, of prediction and target, the moments
    of every chunk of rows: (2, 2, chunks, D) fp32, whose second axis is mean and m2. A gradient for prediction alone.
    """

    @staticmethod
    def forward(
        ctx: Any, prediction: Tensor, targets: Tensor, ids: Tensor, beta: float, scale: float
    ) -> tuple[Tensor, Tensor]:
        prediction, targets, ids = prediction.contiguous(), targets.contiguous(), ids.contiguous()
        width, rows = prediction.shape[-1], ids.numel()
        chunks, columns = triton.cdiv(rows, CHUNK), triton.cdiv(width, CHANNELS)
        losses = targets.new_empty(chunks, columns)
        moments = targets.new_empty(2, 2, chunks, width)
        forward_chunk[(chunks, columns)](
            *(prediction, targets, ids, losses, moments, rows, width, rows // len(targets), targets.shape[1]),
            *(beta, beta > 0, CHUNK, ROWS, CHANNELS),
        )
        ctx.save_for_backward(prediction, targets, ids)
        ctx.beta, ctx.scale = beta, scale
        ctx.mark_non_differentiable(moments)
        return (losses.double().sum() * scale).float(), moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        prediction, targets, ids = ctx.saved_tensors
        width, rows = prediction.shape[-1], ids.numel()
        out = torch.empty_like(prediction)
        backward_tile[(triton.cdiv(rows, ROWS), triton.cdiv(width, CHANNELS))](
            *(prediction, targets, ids, grad, out, rows, width, rows // len(targets), targets.shape[1]),
            *(ctx.beta, ctx.scale, ctx.beta > 0, ROWS, CHANNELS),
        )
        return out, None, None, None, None


def regression_loss(
    prediction: Tensor, targets: Tensor, ids: Tensor, beta: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (); and of all rows, in float64, their number (), means and m2 (2, D) each, of prediction and target."""
    loss, moments = RegressionLoss.apply(prediction, targets, ids, float(beta), float(scale))
    rows = ids.numel()
    first = torch.arange(0, rows, CHUNK, device=ids.device)
    count = (rows - first).clamp_(max=CHUNK).double()[:, None]
    means, m2 = moments.double().unbind(1)
    mean = (means * count).sum(1) / rows
    m2 = (m2 + count * (means - mean[:, None]) ** 2).sum(1)
    return loss, torch.full((), rows, dtype=torch.float64, device=ids.device), mean, m2


@triton.jit
def _tile(prediction, targets, ids, row, channel, real, rows, width, per_sample, steps):  # type: ignore[no-untyped-def]
    """Prediction and target of a tile, fp32; 0 outside."""
    step = tl.load(ids + row, mask=row < rows, other=0)
    p = tl.load(prediction + row[:, None] * width + channel[None, :], mask=real, other=0.0)
    source = (row // per_sample) * steps + step
    t = tl.load(targets + source[:, None] * width + channel[None, :], mask=real, other=0.0)
    return p.to(tl.float32), t


@triton.jit
def forward_chunk(  # type: ignore[no-untyped-def]
    prediction,
    targets,
    ids,
    losses,
    moments,
    rows,
    width,
    per_sample,
    steps,
    beta,
    SMOOTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program takes some channels of a chunk of rows, of which `per_sample` belong to a sample."""
    chunk = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = 0.0
    loss = tl.zeros([CHANNELS], tl.float32)
    p_mean = tl.zeros([CHANNELS], tl.float32)
    p_m2 = tl.zeros([CHANNELS], tl.float32)
    t_mean = tl.zeros([CHANNELS], tl.float32)
    t_m2 = tl.zeros([CHANNELS], tl.float32)
    for offset in range(0, CHUNK, ROWS):
        first = chunk * CHUNK + offset
        row = first + tl.arange(0, ROWS)
        real = (row < rows)[:, None] & (channel < width)[None, :]
        p, t = _tile(prediction, targets, ids, row, channel, real, rows, width, per_sample, steps)
        d = p - t
        if SMOOTH:
            far = tl.abs(d)
            loss += tl.sum(tl.where(far < beta, 0.5 * d * d / beta, far - 0.5 * beta), 0)
        else:
            loss += tl.sum(d * d, 0)
        count = tl.minimum(tl.maximum(rows - first, 0), ROWS).to(tl.float32)
        p_mean, p_m2 = pool_tile(p, real, count, n, p_mean, p_m2)
        t_mean, t_m2 = pool_tile(t, real, count, n, t_mean, t_m2)
        n += count
    chunks = tl.num_programs(0)
    tl.store(losses + chunk * tl.num_programs(1) + tl.program_id(1), tl.sum(loss, 0))
    place = moments + chunk * width + channel
    every = chunks.to(tl.int64) * width
    tl.store(place, p_mean, mask=channel < width)
    tl.store(place + every, p_m2, mask=channel < width)
    tl.store(place + 2 * every, t_mean, mask=channel < width)
    tl.store(place + 3 * every, t_m2, mask=channel < width)


@triton.jit
def backward_tile(  # type: ignore[no-untyped-def]
    prediction,
    targets,
    ids,
    upstream,
    out,
    rows,
    width,
    per_sample,
    steps,
    beta,
    scale,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program takes a tile; `upstream` is the gradient of the loss, a number on the device."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = (row < rows)[:, None] & (channel < width)[None, :]
    p, t = _tile(prediction, targets, ids, row, channel, real, rows, width, per_sample, steps)
    d = p - t
    slope = 2.0 * d
    if SMOOTH:
        slope = tl.where(d >= beta, 1.0, tl.where(d <= -beta, -1.0, d / beta))  # NaN stays NaN
    slope = slope * (tl.load(upstream) * scale)
    tl.store(out + row[:, None] * width + channel[None, :], slope.to(out.dtype.element_ty), mask=real)
