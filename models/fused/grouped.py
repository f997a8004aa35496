"""Grouped convolutions over a channels-last grid as matrix products, forward and for both gradients.

For GPUs, whose library of convolutions is made for one group, or one channel in each, and in 1-D for channels that come
first. Whether this is faster is not known, as it has not run on hardware: so `auto` is torch's (`kernels.ON_REQUEST`).
Tested on the CPU, by Triton's interpreter. The plain twin is `nn.Conv1d` or `nn.Conv2d`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.fused import kernels, taps

WIDEST = 128  # channels of a group that one tile holds


class GroupedConv1d(nn.Conv1d):
    """`nn.Conv1d` that can also be had on channels-last grids."""

    def forward(self, x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """(N, C, T) -> (N, C', T') as in `nn.Conv1d`; or with the grid's `shape` (T,), by the kernels, (N, T, C) ->
        (N, T, C')."""
        if shape is not None:
            return grouped(x, self, shape)
        if self.groups > 1 and taps.plain(self, x):
            return taps.one_line(x, self.weight, self.bias, self.stride[0], int(self.padding[0]), self.groups)
        return super().forward(x)


class GroupedConv2d(nn.Conv2d):
    """`nn.Conv2d` that can also be had on channels-last grids."""

    def forward(self, x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W') as in `nn.Conv2d`; or with the grid's `shape` (H, W), by the kernels,
        (N, H*W, C) -> (N, H*W, C')."""
        return super().forward(x) if shape is None else grouped(x, self, shape)


def applicable(conv: nn.Module) -> bool:
    """Whether the kernels compute this one: groups of up to 128 channels, stride 1, zeros around the grid."""
    return (
        isinstance(conv, GroupedConv1d | GroupedConv2d)
        and conv.groups > 1
        and max(conv.in_channels, conv.out_channels) <= WIDEST * conv.groups
        and set(conv.stride) == set(conv.dilation) == {1}
        and conv.padding_mode == "zeros"
        and all(size % 2 and padding == size // 2 for size, padding in zip(conv.kernel_size, conv.padding, strict=True))
    )


def grouped(x: Tensor, conv: GroupedConv1d | GroupedConv2d, shape: tuple[int, ...]) -> Tensor:
    """An `applicable` convolution on (N, T, C) over a grid of `shape`, prod(shape) = T -> (N, T, C'). Under autocast in
    its type, as torch's would be."""
    weight, bias = conv.weight, conv.bias
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(low), weight.to(low), None if bias is None else bias.to(low)
    return Grouped.apply(x, weight, bias, shape, conv.groups)


class Grouped(torch.autograd.Function):
    """Saves x and the weights. The gradient for x is the convolution of y's with the weights turned round."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], groups: int
    ) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.groups = shape, groups
        return product(x, by_tap(weight, groups).transpose(2, 3), bias, weight.shape[2:], shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        to_x = to_weight = to_bias = None
        if wants_x:
            to_x = product(grad, by_tap(weight, ctx.groups).flip(1), None, weight.shape[2:], ctx.shape)
        if wants_weight:
            sums = summed_products(x, grad, weight, ctx.shape, ctx.groups)
            to_weight = sums.permute(0, 3, 2, 1).reshape(weight.shape).to(weight.dtype)
        if wants_bias:
            to_bias = grad.sum((0, 1))
        return to_x, to_weight, to_bias, None, None


def by_tap(weight: Tensor, groups: int) -> Tensor:
    """(G*O, I, *kernel) -> a view (G, taps, O, I)."""
    return weight.view(groups, -1, weight.shape[1], math.prod(weight.shape[2:])).permute(0, 3, 1, 2)


def plane(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of a grid, or of a kernel, that has one axis or two."""
    return (1, *sizes)[-2:]  # type: ignore[return-value]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """(N, T, G*I) with weights (G, taps, I, O) -> (N, T, G*O)."""
    from models.fused import grouped_kernels

    groups, _, source, target = weight.shape
    y = x.new_empty(*x.shape[:2], groups * target)
    rows, (height, width), (kernel_h, kernel_w) = y.shape[0] * y.shape[1], plane(shape), plane(kernel)
    tile = grouped_kernels.ROWS[x.element_size()]
    grouped_kernels.convolve[(-(-rows // tile) * groups,)](
        x, weight.contiguous(), bias, y, rows, height, width,
        GROUPS=groups, IN=source, OUT=target, KERNEL_H=kernel_h, KERNEL_W=kernel_w, ROWS=tile,
        TILE_IN=grouped_kernels.channels(source), TILE_OUT=grouped_kernels.channels(target),
        WIDEN=kernels.INTERPRETED and x.dtype == torch.bfloat16,
        num_warps=grouped_kernels.WARPS, num_stages=grouped_kernels.STAGES[x.element_size()],
    )  # fmt: skip
    return y


def summed_products(x: Tensor, grad: Tensor, weight: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
    """(N, T, G*I), (N, T, G*O) -> (G, taps, I, O) fp32: the gradient for `weight`, summed over rows in one order."""
    from models.fused import grouped_kernels

    rows, source, target = x.shape[0] * x.shape[1], weight.shape[1], len(weight) // groups
    (height, width), (kernel_h, kernel_w) = plane(shape), plane(weight.shape[2:])
    tile = grouped_kernels.ROWS[x.element_size()] // 2
    chunk, chunks = chunked(rows, tile)
    sums = x.new_empty(chunks, groups, kernel_h * kernel_w, source, target, dtype=torch.float32)
    grouped_kernels.weight_gradient[(chunks * kernel_h * kernel_w * groups,)](
        x, grad, sums, rows, chunk, height, width,
        GROUPS=groups, IN=source, OUT=target, KERNEL_H=kernel_h, KERNEL_W=kernel_w, ROWS=tile,
        TILE_IN=grouped_kernels.channels(source), TILE_OUT=grouped_kernels.channels(target),
        WIDEN=kernels.INTERPRETED and x.dtype == torch.bfloat16,
        num_warps=grouped_kernels.WARPS, num_stages=grouped_kernels.STAGES[x.element_size()],
    )  # fmt: skip
    return sums.sum(0)


def chunked(rows: int, tile: int) -> tuple[int, int]:
    """How many rows, a multiple of `tile`, are summed by one program, and how many such chunks there are."""
    from models.fused.grouped_kernels import CHUNK

    chunks = min(CHUNK["most"], -(-rows // CHUNK["rows"]))
    size = -(-rows // (chunks * tile)) * tile
    return size, -(-rows // size)
