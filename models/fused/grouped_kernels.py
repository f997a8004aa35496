"""Triton kernels of grouped convolutions as matrix products: rows of a channels-last grid times the weights of a tap.

A 1-D grid is a 2-D one of height 1. A group's channels (24 to 64 as published) are one tile, padded to a power of two,
so that a program needs no loop over them, but one over taps. Accumulated in fp32; of fp32, products are exact ("ieee"
for Triton), not TF32. Sizes are fixed, not tuned at run time; meant for Hopper and not run on hardware: the CPU runs
them by Triton's interpreter, whose products of bf16 are those of its bit patterns, so that they are made of fp32
(WIDEN). Imported where a kernel is asked for, as triton is optional.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = {2: 128, 4: 64}  # of a tile, by the bytes of a number
STAGES = {2: 3, 4: 2}
WARPS = 4
CHUNK = {"rows": 4096, "most": 16}  # of rows, each with a sum of its own where weights' gradients are made


def channels(group: int) -> int:
    """Of a tile: a power of two, and what tensor cores take at least."""
    return max(16, triton.next_power_of_2(group))


@triton.jit
def goes_on(
    line: tl.tensor,
    place: tl.tensor,
    vertical: tl.tensor,
    horizontal: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    KERNEL_H: tl.constexpr,
) -> tl.tensor:
    """Whether the grid has a place so far from those that are given by line and place in it."""
    inside = (place + horizontal >= 0) & (place + horizontal < width)
    if KERNEL_H > 1:
        inside &= (line + vertical >= 0) & (line + vertical < height)
    return inside


@triton.jit
def convolve(
    x: tl.tensor,  # (rows, GROUPS * IN)
    weight: tl.tensor,  # (GROUPS, KERNEL_H * KERNEL_W, IN, OUT)
    bias: tl.tensor,  # (GROUPS * OUT,) or None
    y: tl.tensor,  # (rows, GROUPS * OUT)
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    GROUPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    group = tl.program_id(0) % GROUPS  # neighbours read the same rows, of which each takes a part
    row = tl.program_id(0) // GROUPS * ROWS + tl.arange(0, ROWS)
    line, place, present = row // width % height, row % width, row < rows
    source, target = tl.arange(0, TILE_IN), tl.arange(0, TILE_OUT)
    from_x = x + row.to(tl.int64)[:, None] * (GROUPS * IN) + group * IN + source[None, :]
    from_weight = weight + group * (KERNEL_H * KERNEL_W * IN * OUT) + source[:, None] * OUT + target[None, :]
    known = (source < IN)[:, None] & (target < OUT)[None, :]
    total = tl.zeros((ROWS, TILE_OUT), tl.float32)
    for tap in range(KERNEL_H * KERNEL_W):
        vertical, horizontal = tap // KERNEL_W - KERNEL_H // 2, tap % KERNEL_W - KERNEL_W // 2
        real = present & goes_on(line, place, vertical, horizontal, height, width, KERNEL_H)
        near = from_x + (vertical * width + horizontal) * (GROUPS * IN)
        values = tl.load(near, mask=real[:, None] & (source < IN)[None, :], other=0.0)
        weights = tl.load(from_weight + tap * (IN * OUT), mask=known, other=0.0)
        if WIDEN:
            values, weights = values.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(values, weights, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + group * OUT + target, mask=target < OUT, other=0.0).to(tl.float32)[None, :]
    to_y = y + row.to(tl.int64)[:, None] * (GROUPS * OUT) + group * OUT + target[None, :]
    tl.store(to_y, total, mask=present[:, None] & (target < OUT)[None, :])


@triton.jit
def weight_gradient(
    x: tl.tensor,  # (rows, GROUPS * IN)
    grad: tl.tensor,  # (rows, GROUPS * OUT)
    sums: tl.tensor,  # (chunks, GROUPS, KERNEL_H * KERNEL_W, IN, OUT) fp32
    rows: tl.tensor,
    chunk: tl.tensor,  # rows of one, a multiple of ROWS
    height: tl.tensor,
    width: tl.tensor,
    GROUPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    program = tl.program_id(0)  # (chunk, tap, group)
    group, tap = program % GROUPS, program // GROUPS % (KERNEL_H * KERNEL_W)
    first = program // (GROUPS * KERNEL_H * KERNEL_W) * chunk
    vertical, horizontal = tap // KERNEL_W - KERNEL_H // 2, tap % KERNEL_W - KERNEL_W // 2
    source, target = tl.arange(0, TILE_IN), tl.arange(0, TILE_OUT)
    away = (vertical * width + horizontal) * (GROUPS * IN)
    total = tl.zeros((TILE_IN, TILE_OUT), tl.float32)
    for start in range(first, tl.minimum(first + chunk, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        present = row < rows
        real = present & goes_on(row // width % height, row % width, vertical, horizontal, height, width, KERNEL_H)
        from_x = x + row.to(tl.int64)[:, None] * (GROUPS * IN) + group * IN + source[None, :]
        from_grad = grad + row.to(tl.int64)[:, None] * (GROUPS * OUT) + group * OUT + target[None, :]
        values = tl.load(from_x + away, mask=real[:, None] & (source < IN)[None, :], other=0.0)
        slopes = tl.load(from_grad, mask=present[:, None] & (target < OUT)[None, :], other=0.0)
        if WIDEN:
            values, slopes = values.to(tl.float32), slopes.to(tl.float32)
        total = tl.dot(tl.trans(values), slopes, total, input_precision="ieee")
    to_sums = sums + program // (GROUPS * KERNEL_H * KERNEL_W) * (GROUPS * KERNEL_H * KERNEL_W * IN * OUT)
    to_sums += (group * (KERNEL_H * KERNEL_W) + tap) * (IN * OUT) + source[:, None] * OUT + target[None, :]
    tl.store(to_sums, total, mask=(source < IN)[:, None] & (target < OUT)[None, :])
