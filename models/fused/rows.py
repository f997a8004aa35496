"""Rows of positions taken out and put back, in Triton: `models.masks` has the plain twins, `gather_rows` and
`scatter_rows`.

Every result is written in one pass, each element by one program, so that a step repeats bit for bit: gradients of a
sample's masks are added up by asking each mask where it has a position, instead of adding them as they come. Compiled
and run through Triton's interpreter; not run on hardware. Imported only where Triton is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048  # elements of `take`, whole rows


class Gather(torch.autograd.Function):
    """(B, T, D) and ids (B*M, K) -> (B*M, K, D): see `models.masks.gather_rows`. The ids of a row are distinct."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.samples, ctx.steps = x.shape[:2]
        return _take(x, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        grad, (rows, kept), width = grad.contiguous(), ids.shape, grad.shape[-1]
        out = grad.new_empty(ctx.samples, ctx.steps, width)
        add_up[(ctx.samples * ctx.steps,)](
            *(grad, places(ids, ctx.steps), out, width, rows // ctx.samples, ctx.steps, kept),
            triton.next_power_of_2(width),
        )
        return out, None


class Scatter(torch.autograd.Function):
    """(N, K, D) -> (N, length, D) with `std` times Gaussian noise in between: see `models.masks.scatter_rows`."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, ids: Tensor, length: int, std: float, seeds: Tensor | None) -> Tensor:
        ctx.save_for_backward(ids)
        kept, (rows, _, width) = kept if kept.stride(-1) == 1 else kept.contiguous(), kept.shape
        out = kept.new_empty(rows, length, width)
        masks = 1 if seeds is None else rows // len(seeds)
        quarter = triton.cdiv(width, 4)
        put[(rows * length,)](
            *(kept, places(ids, length), ids if seeds is None else seeds, out, width, quarter, length, masks),
            *(*kept.stride()[:2], std, seeds is not None, triton.next_power_of_2(quarter)),
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _take(grad, *ctx.saved_tensors), None, None, None, None


def scatter(kept: Tensor, ids: Tensor, length: int, std: float, seeds: Sequence[int]) -> Tensor:
    """`models.masks.scatter_rows`. The noise is Philox4x32-10's (Salmon et al. 2011), by Box and Muller, a function of
    (seed, mask, position, channel) alone; not the numbers that torch's generator gives for that seed."""
    if not std:
        return Scatter.apply(kept, ids, length, 0.0, None)
    if len(kept) % len(seeds):
        raise ValueError(f"{len(kept)} rows of {len(seeds)} samples: every sample has as many rows")
    keys = torch.tensor(seeds, dtype=torch.int64, pin_memory=kept.is_cuda)
    return Scatter.apply(kept, ids, length, float(std), keys.to(kept.device, non_blocking=True))  # nothing waits for it


def places(ids: Tensor, length: int) -> Tensor:
    """Which of a row's ids (N, K), distinct below `length`, each position is: (N, length) int32, -1 if none."""
    out = torch.full((len(ids), length), -1, dtype=torch.int32, device=ids.device)
    return out.scatter_(1, ids, torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device).expand_as(ids))


def _take(x: Tensor, ids: Tensor) -> Tensor:
    x, ids, width = x.contiguous(), ids.contiguous(), x.shape[-1]
    out = x.new_empty(*ids.shape, width)
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    grid = (triton.cdiv(ids.numel(), rows),)
    take[grid](x, ids, out, ids.numel(), width, ids.numel() // len(x), x.shape[1], rows, block)
    return out


@triton.jit
def take(x, ids, out, rows, width, per_sample, steps, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program copies some rows, of which `per_sample` come from a sample."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    real = (row < rows)[:, None] & (channel < width)[None, :]
    source = (row // per_sample) * steps + tl.load(ids + row, mask=row < rows, other=0)
    y = tl.load(x + source[:, None] * width + channel[None, :], mask=real)
    tl.store(out + row[:, None] * width + channel[None, :], y, mask=real)


@triton.jit
def add_up(grad, places, out, width, masks, steps, kept, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program takes a position of a sample: the sum, in fp32, over the masks that keep it."""
    position = tl.program_id(0).to(tl.int64)
    sample, step = position // steps, position % steps
    channel = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for mask in range(masks):
        row = sample * masks + mask
        place = tl.load(places + row * steps + step)
        source = grad + (row * kept + place) * width + channel
        total += tl.load(source, mask=channel < tl.where(place >= 0, width, 0), other=0.0).to(tl.float32)
    tl.store(out + position * width + channel, total.to(out.dtype.element_ty), mask=channel < width)


@triton.jit
def put(  # type: ignore[no-untyped-def]
    kept,
    places,
    seeds,
    out,
    width,
    quarter,
    steps,
    masks,
    row_stride,
    step_stride,
    std,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program writes a position of a row: what was kept of it, else noise, or 0. One call of Philox gives the normal
    numbers of four channels, a `quarter` of them apart."""
    position = tl.program_id(0).to(tl.int64)
    row = position // steps
    channel = tl.arange(0, BLOCK)
    place = tl.load(places + position)
    target = out + position * width + channel
    if place >= 0:
        source = kept + row * row_stride + place.to(tl.int64) * step_stride + channel
        for i in tl.static_range(4):
            real = (channel < quarter) & (channel + i * quarter < width)
            tl.store(target + i * quarter, tl.load(source + i * quarter, mask=real), mask=real)
    else:
        a = tl.zeros([BLOCK], tl.float32)
        b = a
        c = a
        d = a
        if NOISE:
            seed = tl.load(seeds + row // masks)
            zero = channel * 0
            step = zero + (position % steps).to(tl.int32)
            mask = zero + (row % masks).to(tl.int32)
            w, x, y, z = tl.philox(seed, channel, step, mask, zero)
            a, b = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w), tl.uint_to_uniform_float(x))
            c, d = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(y), tl.uint_to_uniform_float(z))
        inside = channel < quarter
        low = out.dtype.element_ty
        tl.store(target, (a * std).to(low), mask=inside & (channel < width))
        tl.store(target + quarter, (b * std).to(low), mask=inside & (channel + quarter < width))
        tl.store(target + 2 * quarter, (c * std).to(low), mask=inside & (channel + 2 * quarter < width))
        tl.store(target + 3 * quarter, (d * std).to(low), mask=inside & (channel + 3 * quarter < width))
