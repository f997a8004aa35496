"""Attention with linear biases, padding and dropout as kernels in Triton, forward and backward: FlashAttention-2 (Dao
2023), whose tiles get |i - j| from the positions of kept frames and draw again what was dropped.

Neither logits, weights nor distances are ever in memory: for the backward pass stay qkv, the output and a logsumexp a
query. The plain twin is `models.fused.attention.plain_attention`. Importing this needs Triton. Compiled for compute
capability 9.0 and run in Triton's interpreter, not run on hardware.

Shapes: N rows, K positions, H heads, W a head's width. A tile has QUERIES x KEYS logits and COLUMNS, the power of two
from W on, of a head's width. In kernels logits and logsumexp count in powers of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.fused import kernels

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(torch.finfo(torch.float32).min)  # a logit of padding
INTERPRETED = tl.constexpr(kernels.INTERPRETED)
SHARE = tl.constexpr(2**16)  # weights are dropped with a probability of so many parts
ROUNDS = tl.constexpr(7)  # with as many Philox 4x32 passes BigCrush (Salmon et al. 2011)


class Tile(NamedTuple):
    """What one program holds at a time, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile
    to_queries: Tile
    to_keys: Tile


def tiles(dtype: torch.dtype, width: int) -> Tiles:
    """For heads of `width`. A table, as trying at run time would make results depend on the clock. Chosen by what the
    assembler says of compute capability 9.0 with everything on: no register spilled at half precision, few in fp32.
    None was timed."""
    if dtype == torch.float32:  # no tensor cores: they would round what is multiplied
        if width <= 64:
            return Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
        return Tiles(Tile(32, 16, 8, 1), Tile(16, 32, 8, 1), Tile(32, 32, 8, 1))
    if width <= 64:
        return Tiles(Tile(128, 64, 8, 3), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3))
    return Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2))


class FlashAttention(torch.autograd.Function):
    """`apply(qkv, slope, positions, padding, dropout, seed)`: (N, K, 3, H, W) of any strides -> (N, K, H*W). The rest
    as in `models.fused.attention.Bias`; weights are dropped with probability `dropout`, to 2^-16, by what `seed`, row,
    head, query and key say. The same from call to call, bit for bit: sums are taken in one order."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        slope: Tensor | None,
        positions: Tensor | None,
        padding: Tensor | None,
        dropout: float,
        seed: int,
    ) -> Tensor:
        n, t, _, heads, width = qkv.shape
        positions = None if slope is None or positions is None else positions.contiguous()
        slope = None if positions is None else slope
        padding = None if padding is None else padding.contiguous()
        out = qkv.new_empty(n, t, heads * width)
        lse = qkv.new_empty(n, heads, t, dtype=torch.float32)
        tile = tiles(qkv.dtype, width).forward
        launch(forward_kernel, tile, tile.queries, qkv, slope, positions, padding, dropout, seed, out, lse)
        ctx.save_for_backward(qkv, slope, positions, padding, out, lse)
        ctx.dropout, ctx.seed = dropout, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, slope, positions, padding, out, lse = ctx.saved_tensors
        n, t, _, heads, width = qkv.shape
        given = qkv, slope, positions, padding, ctx.dropout, ctx.seed
        grad = grad.contiguous()
        to_qkv = qkv.new_empty(qkv.shape)
        delta = torch.empty_like(lse)
        chosen = tiles(qkv.dtype, width)
        by_tile = None
        if slope is not None and ctx.needs_input_grad[1]:
            by_tile = lse.new_empty(n, triton.cdiv(t, chosen.to_queries.queries), heads)
        tile = chosen.to_queries
        launch(query_gradient_kernel, tile, tile.queries, *given, out, lse, grad, to_qkv, delta, by_tile)
        tile = chosen.to_keys
        launch(key_gradient_kernel, tile, tile.keys, *given, lse, grad, to_qkv, delta)
        return to_qkv, None if by_tile is None else by_tile.sum((0, 1)), None, None, None, None


def launch(
    kernel: Any,
    tile: Tile,
    block: int,
    qkv: Tensor,
    slope: Tensor | None,
    positions: Tensor | None,
    padding: Tensor | None,
    dropout: float,
    seed: int,
    *others: Tensor | None,
) -> None:
    """One program for every `block` positions of every row and head; programs of one head run side by side."""
    n, t, _, heads, width = qkv.shape
    shared = positions is None or len(positions) == 1
    kernel[(triton.cdiv(t, block) * heads * n,)](
        qkv, slope, positions, padding, *others, seed, t, heads, *qkv.stride(), 0 if shared else t,
        WIDTH=width, COLUMNS=max(16, triton.next_power_of_2(width)), DROPPED=round(dropout * SHARE.value),
        QUERIES=tile.queries, KEYS=tile.keys, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def place(length: tl.tensor, heads: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """This program's row, head, block and the block's positions (BLOCK,)."""
    blocks = tl.cdiv(length, BLOCK)
    block = tl.program_id(0) % blocks
    which = tl.program_id(0) // blocks
    return which // heads, which % heads, block, block * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load(
    first: tl.tensor, at: tl.tensor, columns: tl.tensor, stride: tl.tensor, apart: tl.tensor, length: tl.tensor,
    WIDTH: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One head at some positions, (BLOCK, COLUMNS): zero behind the last position and behind the head's width."""
    inside = (at[:, None] < length) & (columns[None, :] < WIDTH)
    return tl.load(first + at[:, None] * stride + columns[None, :] * apart, mask=inside, other=0.0)


@triton.jit
def load_each(first: tl.tensor, offset: tl.tensor, at: tl.tensor, length: tl.tensor, behind: tl.constexpr) -> tl.tensor:
    """A number for each position, (BLOCK,) fp32, and for those `behind` the last; None of None."""
    if first is None:
        return None
    else:
        return tl.load(first + offset + at, mask=at < length, other=behind).to(tl.float32)


@triton.jit
def product(a: tl.tensor, b: tl.tensor, to: tl.tensor) -> tl.tensor:
    """`to` + a @ b, exact for fp32."""
    if INTERPRETED:  # numpy knows bf16 as whole numbers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), to, input_precision="ieee")
    else:
        return tl.dot(a, b, to, input_precision="ieee")


@triton.jit
def scores(
    left: tl.tensor, right: tl.tensor, here: tl.tensor, there: tl.tensor, steep: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """Logits of a tile with one side's (BLOCK, COLUMNS) and positions `here`, and the other's `there`; and distances,
    zero where `steep` is None."""
    logits = product(left, tl.trans(right), tl.zeros((left.shape[0], right.shape[0]), tl.float32))
    logits *= LOG2E * WIDTH**-0.5
    distance = 0.0
    if steep is not None:
        distance = tl.abs(here[:, None] - there[None, :])
        logits += (steep * LOG2E) * distance
    return logits, distance


@triton.jit
def kept(
    seed: tl.tensor, row: tl.tensor, head: tl.tensor, queries: tl.tensor, start: tl.tensor, DROPPED: tl.constexpr,
    KEYS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(QUERIES, KEYS) bool: which weights of the keys from `start` on stay. Eight neighbouring keys take the halves of
    the four words of one call."""
    eighths = start // 8 + tl.arange(0, KEYS // 8)
    a, b, c, d = tl.philox(seed, queries[:, None], eighths[None, :], head, row, ROUNDS)
    low = tl.join(tl.join(a & 0xFFFF, b & 0xFFFF), tl.join(c & 0xFFFF, d & 0xFFFF))
    high = tl.join(tl.join(a >> 16, b >> 16), tl.join(c >> 16, d >> 16))
    return tl.reshape(tl.join(low, high) >= DROPPED, (queries.shape[0], KEYS))


@triton.jit(do_not_specialize=["seed", "length", "by_positions"])
def forward_kernel(
    qkv: tl.tensor, slope: tl.tensor, positions: tl.tensor, padding: tl.tensor, out: tl.tensor, lse: tl.tensor,
    seed: tl.tensor, length: tl.tensor, heads: tl.tensor, by_row: tl.tensor, by_position: tl.tensor,
    by_part: tl.tensor, by_head: tl.tensor, by_column: tl.tensor, by_positions: tl.tensor,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DROPPED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
) -> None:  # fmt: skip
    """A program for every QUERIES queries; `out` and `lse` (N, H, K)."""
    row, head, _block, queries = place(length, heads, QUERIES)
    columns = tl.arange(0, COLUMNS)
    first = qkv + row.to(tl.int64) * by_row + head * by_head
    q = load(first, queries, columns, by_position, by_column, length, WIDTH)
    steep = load_each(slope, 0, head, heads, 0)
    here = load_each(positions, row * by_positions, queries, length, 0)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, COLUMNS), tl.float32)
    for start in range(0, length, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = load(first + by_part, keys, columns, by_position, by_column, length, WIDTH)
        there = load_each(positions, row * by_positions, keys, length, 0)
        logits, _distance = scores(q, k, here, there, steep, WIDTH)
        if padding is not None:
            logits = tl.where(load_each(padding, row * length, keys, length, 1)[None, :] > 0, LEAST, logits)
        logits = tl.where(keys[None, :] < length, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        shrink = tl.exp2(largest - larger)
        weights = tl.exp2(logits - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if DROPPED > 0:
            weights = tl.where(kept(seed, row, head, queries, start, DROPPED, KEYS), weights, 0.0)
        v = load(first + 2 * by_part, keys, columns, by_position, by_column, length, WIDTH)
        mixed = product(weights.to(v.dtype), v, mixed * shrink[:, None])
        largest = larger
    mixed *= (1.0 / total * (SHARE / (SHARE - DROPPED)))[:, None]
    to = out + row.to(tl.int64) * length * heads * WIDTH + head * WIDTH
    inside = queries[:, None] < length
    tl.store(
        to + queries[:, None] * (heads * WIDTH) + columns[None, :], mixed.to(out.dtype.element_ty),
        mask=inside & (columns[None, :] < WIDTH),
    )  # fmt: skip
    tl.store(
        lse + (row * heads + head).to(tl.int64) * length + queries, largest + tl.log2(total), mask=queries < length
    )


@triton.jit(do_not_specialize=["seed", "length", "by_positions"])
def query_gradient_kernel(
    qkv: tl.tensor, slope: tl.tensor, positions: tl.tensor, padding: tl.tensor, out: tl.tensor, lse: tl.tensor,
    grad: tl.tensor, to_qkv: tl.tensor, delta: tl.tensor, by_tile: tl.tensor,
    seed: tl.tensor, length: tl.tensor, heads: tl.tensor, by_row: tl.tensor, by_position: tl.tensor,
    by_part: tl.tensor, by_head: tl.tensor, by_column: tl.tensor, by_positions: tl.tensor,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DROPPED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
) -> None:  # fmt: skip
    """A program for every QUERIES queries. Leaves in `delta` (N, H, K) what key_gradient_kernel needs, the product of
    each output and its gradient; and in `by_tile` (N, tiles, H), if given, the tile's share of slope's gradient."""
    row, head, block, queries = place(length, heads, QUERIES)
    columns = tl.arange(0, COLUMNS)
    first = qkv + row.to(tl.int64) * by_row + head * by_head
    each = (row * heads + head).to(tl.int64) * length  # of lse and delta
    flat = row.to(tl.int64) * length * heads * WIDTH + head * WIDTH  # of out and grad
    q = load(first, queries, columns, by_position, by_column, length, WIDTH)
    g = load(grad + flat, queries, columns, heads * WIDTH, 1, length, WIDTH)
    o = load(out + flat, queries, columns, heads * WIDTH, 1, length, WIDTH)
    inner = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + each + queries, inner, mask=queries < length)
    sums = load_each(lse, each, queries, length, float("inf"))
    steep = load_each(slope, 0, head, heads, 0)
    here = load_each(positions, row * by_positions, queries, length, 0)
    tilt = tl.zeros((QUERIES,), tl.float32)
    to_q = tl.zeros((QUERIES, COLUMNS), tl.float32)
    for start in range(0, length, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = load(first + by_part, keys, columns, by_position, by_column, length, WIDTH)
        v = load(first + 2 * by_part, keys, columns, by_position, by_column, length, WIDTH)
        there = load_each(positions, row * by_positions, keys, length, 0)
        logits, distance = scores(q, k, here, there, steep, WIDTH)
        seen = keys < length
        if padding is not None:
            seen = load_each(padding, row * length, keys, length, 1) == 0
        weights = tl.exp2(tl.where(seen[None, :], logits, float("-inf")) - sums[:, None])
        to_weights = product(g, tl.trans(v), tl.zeros((QUERIES, KEYS), tl.float32))
        if DROPPED > 0:
            stays = kept(seed, row, head, queries, start, DROPPED, KEYS)
            to_weights = tl.where(stays, to_weights * (SHARE / (SHARE - DROPPED)), 0.0)
        to_logits = weights * (to_weights - inner[:, None])
        if by_tile is not None:
            tilt += tl.sum(to_logits * distance, 1)
        to_q = product(to_logits.to(k.dtype), k, to_q)
    tl.store(
        to_qkv + 3 * flat - 2 * head * WIDTH + queries[:, None] * (3 * heads * WIDTH) + columns[None, :],
        (to_q * WIDTH**-0.5).to(to_qkv.dtype.element_ty),
        mask=(queries[:, None] < length) & (columns[None, :] < WIDTH),
    )  # fmt: skip
    if by_tile is not None:
        tl.store(by_tile + (row * tl.cdiv(length, QUERIES) + block) * heads + head, tl.sum(tilt))


@triton.jit(do_not_specialize=["seed", "length", "by_positions"])
def key_gradient_kernel(
    qkv: tl.tensor, slope: tl.tensor, positions: tl.tensor, padding: tl.tensor, lse: tl.tensor, grad: tl.tensor,
    to_qkv: tl.tensor, delta: tl.tensor,
    seed: tl.tensor, length: tl.tensor, heads: tl.tensor, by_row: tl.tensor, by_position: tl.tensor,
    by_part: tl.tensor, by_head: tl.tensor, by_column: tl.tensor, by_positions: tl.tensor,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DROPPED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
) -> None:  # fmt: skip
    """A program for every KEYS keys, with tiles on their side: (KEYS, QUERIES), so that products take them as they
    are."""
    row, head, block, keys = place(length, heads, KEYS)
    columns = tl.arange(0, COLUMNS)
    first = qkv + row.to(tl.int64) * by_row + head * by_head
    each = (row * heads + head).to(tl.int64) * length
    flat = row.to(tl.int64) * length * heads * WIDTH + head * WIDTH
    k = load(first + by_part, keys, columns, by_position, by_column, length, WIDTH)
    v = load(first + 2 * by_part, keys, columns, by_position, by_column, length, WIDTH)
    steep = load_each(slope, 0, head, heads, 0)
    here = load_each(positions, row * by_positions, keys, length, 0)
    if padding is not None:
        hidden = load_each(padding, row * length, keys, length, 1)[:, None] > 0
    to_k = tl.zeros((KEYS, COLUMNS), tl.float32)
    to_v = tl.zeros((KEYS, COLUMNS), tl.float32)
    for start in range(0, length, QUERIES):
        queries = start + tl.arange(0, QUERIES)
        q = load(first, queries, columns, by_position, by_column, length, WIDTH)
        g = load(grad + flat, queries, columns, heads * WIDTH, 1, length, WIDTH)
        sums = load_each(lse, each, queries, length, float("inf"))[None, :]
        there = load_each(positions, row * by_positions, queries, length, 0)
        logits, _distance = scores(k, q, here, there, steep, WIDTH)
        if padding is not None:
            logits = tl.where(hidden, float("-inf"), logits)
        weights = tl.exp2(logits - sums)
        left = weights
        if padding is not None:  # all alike where there is nothing else to see
            left = tl.where(hidden, tl.where(sums <= LEAST, 1.0 / length, 0.0), weights)
        to_weights = product(v, tl.trans(g), tl.zeros((KEYS, QUERIES), tl.float32))
        if DROPPED > 0:
            stays = tl.trans(kept(seed, row, head, queries, block * KEYS, DROPPED, KEYS))
            left = tl.where(stays, left, 0.0)
            to_weights = tl.where(stays, to_weights * (SHARE / (SHARE - DROPPED)), 0.0)
        to_v = product(left.to(g.dtype), g, to_v)
        to_logits = weights * (to_weights - load_each(delta, each, queries, length, 0)[None, :])
        to_k = product(to_logits.to(q.dtype), q, to_k)
    to = to_qkv + 3 * flat - 2 * head * WIDTH + keys[:, None] * (3 * heads * WIDTH) + columns[None, :]
    inside = (keys[:, None] < length) & (columns[None, :] < WIDTH)
    tl.store(to + heads * WIDTH, (to_k * WIDTH**-0.5).to(to_qkv.dtype.element_ty), mask=inside)
    tl.store(to + 2 * heads * WIDTH, (to_v * (SHARE / (SHARE - DROPPED))).to(to_qkv.dtype.element_ty), mask=inside)
