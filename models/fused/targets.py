"""The teacher's outputs, normalised and summed up as they come, in Triton: `models.targets` has the plain twin.

A block's output is read as it is, once for its moments over time, if they are wanted, and once to be added; neither an
fp32 copy of it nor anything else of its size is made but the running total. Compiled and run through Triton's
interpreter; not run on hardware. Imported only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.config import TargetConfig
from models.fused.moments import pool_tile

EPS = tl.constexpr(1e-5)
STEPS, CHANNELS = 64, 64  # a tile of `time_moments`
TILE = 4096  # elements of `add_rows`, whole rows


def add_layer(total: Tensor | None, ffn: Tensor, config: TargetConfig) -> Tensor:
    """Adds a block's output (B, T, D), a slice of a longer one or not, to the fp32 `total` (B, T, D), which comes back;
    None begins one. One launch, and one more for the norm over time (docs/method.md 1.5)."""
    ffn = ffn if ffn.stride(-1) == 1 else ffn.contiguous()
    begun = total is not None
    total = ffn.new_empty(ffn.shape, dtype=torch.float32) if total is None else total
    _add(total, ffn, config.instance_norm_layer, config.layer_norm_layer, begun)
    return total


def finish(total: Tensor, config: TargetConfig) -> Tensor:
    """The sum over blocks (B, T, D) becomes their mean, normalised once more: in place, in one to three launches."""
    _add(total, total, False, config.layer_norm, False, config.top_k_layers)
    if config.instance_norm:
        _add(total, total, True, False, False)
    return total


def _add(total: Tensor, x: Tensor, over_time: bool, over_channels: bool, begun: bool, count: int = 1) -> None:
    samples, steps, width = x.shape
    mean = rstd = total  # not read
    if over_time:
        mean, rstd = total.new_empty(2, samples, width)
        grid = (samples, triton.cdiv(width, CHANNELS))
        time_moments[grid](x, mean, rstd, steps, width, x.stride(0), x.stride(1), STEPS, CHANNELS)
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    add_rows[(samples, triton.cdiv(steps, rows))](
        *(total, x, mean, rstd, steps, width, x.stride(0), x.stride(1)),
        *(over_time, over_channels, begun, count, rows, block),
        num_warps=8,
    )


@triton.jit
def time_moments(x, mean, rstd, steps, width, sample_stride, step_stride, STEPS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program takes some channels of a sample: their mean and 1 / deviation over time."""
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = 0.0
    centre = tl.zeros([CHANNELS], tl.float32)
    m2 = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, steps, STEPS):
        step = first + tl.arange(0, STEPS)
        real = (step < steps)[:, None] & (channel < width)[None, :]
        place = x + sample * sample_stride + step.to(tl.int64)[:, None] * step_stride + channel[None, :]
        y = tl.load(place, mask=real, other=0.0).to(tl.float32)
        count = tl.minimum(steps - first, STEPS).to(tl.float32)
        centre, m2 = pool_tile(y, real, count, n, centre, m2)
        n += count
    place = sample * width + channel
    tl.store(mean + place, centre, mask=channel < width)
    tl.store(rstd + place, tl.rsqrt(m2 / n + EPS), mask=channel < width)


@triton.jit
def add_rows(  # type: ignore[no-untyped-def]
    total,
    x,
    mean,
    rstd,
    steps,
    width,
    sample_stride,
    step_stride,
    OVER_TIME: tl.constexpr,
    OVER_CHANNELS: tl.constexpr,
    BEGUN: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes some whole rows of a sample: total, or 0, + norm(x / COUNT). `total` may be x itself."""
    sample = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    real = (step < steps)[:, None] & (channel < width)[None, :]
    place = x + sample * sample_stride + step.to(tl.int64)[:, None] * step_stride + channel[None, :]
    y = tl.load(place, mask=real, other=0.0).to(tl.float32)
    if COUNT > 1:
        y = y / COUNT
    if OVER_TIME:
        centre = tl.load(mean + sample * width + channel, mask=channel < width, other=0.0)
        scale = tl.load(rstd + sample * width + channel, mask=channel < width, other=0.0)
        y = (y - centre[None, :]) * scale[None, :]
    if OVER_CHANNELS:
        y = tl.where(real, y - (tl.sum(y, 1) / width)[:, None], 0.0)
        y = y * tl.rsqrt(tl.sum(y * y, 1) / width + EPS)[:, None]
    place = total + (sample * steps + step)[:, None] * width + channel[None, :]
    if BEGUN:
        y += tl.load(place, mask=real, other=0.0)
    tl.store(place, y, mask=real)
