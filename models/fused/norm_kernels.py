"""Triton kernels of LayerNorms that do more than normalise: what comes before them and after them in the same pass.

A program has a tile of whole rows, about 2048 numbers. Statistics, and all arithmetic, are fp32 whatever is read.
Sizes are fixed, not tuned at run time, so that nothing depends on timing; meant for Hopper and not run on hardware: the
CPU runs them by Triton's interpreter. Imported where a kernel is asked for, as triton is optional.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

PROGRAMS = 512  # of a backward pass that sums over rows: a sum for each, then torch's of those, in one order always


class Tile(NamedTuple):
    columns: int  # a power of two
    rows: int
    warps: int


def tile(width: int) -> Tile:
    """16 numbers a thread, or more for rows over 4096."""
    columns = triton.next_power_of_2(max(width, 4))
    return Tile(columns, max(1, 2048 // columns), 8 if columns > 2048 else 4)


@triton.jit
def statistics(x: tl.tensor, inside: tl.tensor, WIDTH: tl.constexpr, eps: tl.tensor) -> tl.tensor:
    """Mean and 1 / standard deviation of rows (R, C) fp32, zero where not inside -> (R, 1), (R, 1)."""
    mean = tl.sum(x, 1) / WIDTH
    mean = mean[:, None]
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, 1) / WIDTH
    return mean, 1.0 / tl.sqrt(variance[:, None] + eps)


@triton.jit
def kept(
    row: tl.tensor, seed: tl.tensor, dropout: tl.tensor, scale: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """0 with probability `dropout`, else `scale`: (ROWS, COLUMNS) fp32, a function of seed, row and column alone.

    Philox (Salmon et al. 2011) yields four words a call, one for each of four neighbours; 24 bits of them are used.
    """
    QUARTER: tl.constexpr = COLUMNS // 4
    call = row.to(tl.uint32)[:, None] * QUARTER + tl.arange(0, QUARTER)[None, :].to(tl.uint32)
    a, b, c, d = tl.randint4x(seed, call)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (ROWS, COLUMNS))
    uniform = (words.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return tl.where(uniform >= dropout, scale, 0.0)


@triton.jit(do_not_specialize=["seed"])
def residual_norm_forward(
    x: tl.tensor,
    f: tl.tensor,
    factor: tl.tensor,  # (N,) or None: of each sample's f
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,  # x + f, or None where nothing is saved
    moments: tl.tensor,  # (2, rows) fp32 or None: mean, 1 / standard deviation
    rows: tl.tensor,
    length: tl.tensor,  # rows of a sample
    eps: tl.tensor,
    dropout: tl.tensor,
    scale: tl.tensor,
    seed: tl.tensor,
    WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    present = (row < rows)[:, None]
    inside = present & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    added = tl.load(f + at, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        added *= kept(row, seed, dropout, scale, ROWS, COLUMNS)
    if factor is not None:
        added *= tl.load(factor + row // length, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + added
    mean, rstd = statistics(s, inside, WIDTH, eps)
    scaled = (s - mean) * rstd * tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    out = scaled + tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, out, mask=inside)
    if total is not None:
        tl.store(total + at, s, mask=inside)
        tl.store(moments + row[:, None], mean, mask=present)
        tl.store(moments + rows + row[:, None], rstd, mask=present)


@triton.jit(do_not_specialize=["seed"])
def residual_norm_backward(
    grad: tl.tensor,
    total: tl.tensor,
    moments: tl.tensor,
    factor: tl.tensor,
    weight: tl.tensor,
    to_x: tl.tensor,
    to_f: tl.tensor,  # or None where it is to_x
    to_weight: tl.tensor,  # (programs, WIDTH) fp32
    to_bias: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    dropout: tl.tensor,
    scale: tl.tensor,
    seed: tl.tensor,
    WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        present = (row < rows)[:, None]
        inside = present & (column < WIDTH)[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(moments + row[:, None], mask=present, other=0.0)
        rstd = tl.load(moments + rows + row[:, None], mask=present, other=0.0)
        normal = tl.where(inside, (tl.load(total + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd, 0.0)
        sum_weight += g * normal
        sum_bias += g
        to_normal = g * w
        along = tl.sum(to_normal * normal, 1) / WIDTH
        level = tl.sum(to_normal, 1) / WIDTH
        to_sum = (to_normal - level[:, None] - normal * along[:, None]) * rstd
        tl.store(to_x + at, to_sum, mask=inside)
        if to_f is not None:
            if DROPOUT:
                to_sum *= kept(row, seed, dropout, scale, ROWS, COLUMNS)
            if factor is not None:
                to_sum *= tl.load(factor + row // length, mask=row < rows, other=0.0).to(tl.float32)[:, None]
            tl.store(to_f + at, to_sum, mask=inside)
    own = tl.program_id(0) * WIDTH + column
    tl.store(to_weight + own, tl.sum(sum_weight, 0), mask=column < WIDTH)
    tl.store(to_bias + own, tl.sum(sum_bias, 0), mask=column < WIDTH)


@triton.jit
def norm_gelu_forward(
    x: tl.tensor,
    residual: tl.tensor,  # or None
    weight: tl.tensor,  # with bias, or both None
    bias: tl.tensor,
    y: tl.tensor,
    moments: tl.tensor,  # (2, rows) fp32, or None where nothing is saved
    rows: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    present = (row < rows)[:, None]
    inside = present & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mean, rstd = statistics(s, inside, WIDTH, eps)
    z = (s - mean) * rstd
    if weight is not None:
        z *= tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
        z += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    out = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if residual is not None:
        out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, out, mask=inside)
    if moments is not None:
        tl.store(moments + row[:, None], mean, mask=present)
        tl.store(moments + rows + row[:, None], rstd, mask=present)


@triton.jit
def norm_gelu_backward(
    grad: tl.tensor,
    x: tl.tensor,
    moments: tl.tensor,
    weight: tl.tensor,  # with all that follow but to_x, or all None
    bias: tl.tensor,
    to_x: tl.tensor,
    to_weight: tl.tensor,  # (programs, WIDTH) fp32
    to_bias: tl.tensor,
    rows: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column = tl.arange(0, COLUMNS)
    w = tl.full((1, COLUMNS), 1.0, tl.float32)
    b = tl.zeros((1, COLUMNS), tl.float32)
    if weight is not None:
        w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
        b = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        present = (row < rows)[:, None]
        inside = present & (column < WIDTH)[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        mean = tl.load(moments + row[:, None], mask=present, other=0.0)
        rstd = tl.load(moments + rows + row[:, None], mask=present, other=0.0)
        normal = tl.where(inside, (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd, 0.0)
        z = normal * w + b
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
        to_z = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * slope
        if weight is not None:
            sum_weight += to_z * normal
            sum_bias += to_z
        to_normal = to_z * w
        along = tl.sum(to_normal * normal, 1) / WIDTH
        level = tl.sum(to_normal, 1) / WIDTH
        tl.store(to_x + at, (to_normal - level[:, None] - normal * along[:, None]) * rstd, mask=inside)
    if weight is not None:
        own = tl.program_id(0) * WIDTH + column
        tl.store(to_weight + own, tl.sum(sum_weight, 0), mask=column < WIDTH)
        tl.store(to_bias + own, tl.sum(sum_bias, 0), mask=column < WIDTH)
