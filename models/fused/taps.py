"""1-D convolution without groups on channels-last rows in fp32 on CPUs, its gradients a matrix product for each tap.

Tap j of the kernel sees every `stride`-th row from the j-th on, which BLAS reads and writes in place, so that nothing
is transposed or unfolded. oneDNN is the faster forward, on rows that pass for a picture of one line, but its backward
pass takes up to four times as long (benchmarks/README.md). The plain twin is `nn.Conv1d`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEWEST = 32  # channels that make a matrix product of a tap


def applicable(conv: nn.Conv1d, x: Tensor) -> bool:
    return conv.groups == 1 and conv.in_channels >= FEWEST and plain(conv, x) and not torch.compiler.is_compiling()


def plain(conv: nn.Conv1d, x: Tensor) -> bool:
    """fp32 or float64 on the CPU, zeros around it, and a kernel without holes."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and conv.dilation == (1,)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def convolve(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """(N, T, C) -> (N, T', C')."""
    return Convolution.apply(x, conv.weight, conv.bias, conv.stride[0], conv.padding[0])


def one_line(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int = 1) -> Tensor:
    """`F.conv1d` of (N, C, T) as of a picture of one line, which oneDNN takes as it is if it is a view of rows."""
    return F.conv2d(x[:, :, None], weight[:, :, None], bias, (1, stride), (0, padding), 1, groups)[:, :, 0]


class Convolution(torch.autograd.Function):
    """Saves x and the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return one_line(x.transpose(1, 2), weight, bias, stride, padding).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        grad, length, padding = grad.contiguous(), grad.shape[1], ctx.padding
        to_x = to_weight = None
        if of_x:
            by_tap = weight.permute(2, 0, 1).contiguous()  # (k, C', C)
            to_x = x.new_zeros(len(x), x.shape[1] + 2 * padding, x.shape[2])
            for into, sample in zip(to_x, grad, strict=True):
                for j, tap in enumerate(by_tap):
                    rows(into, j, ctx.stride, length).addmm_(sample, tap)
            to_x = to_x[:, padding : padding + x.shape[1]]
        if of_weight:
            by_tap = weight.new_zeros(weight.shape[2], *weight.shape[:2])
            padded = F.pad(x, (0, 0, padding, padding)) if padding else x
            for sample, out in zip(padded, grad, strict=True):
                for j, tap in enumerate(by_tap):
                    tap.addmm_(out.t(), rows(sample, j, ctx.stride, length))
            to_weight = by_tap.permute(1, 2, 0)
        return to_x, to_weight, grad.sum((0, 1)) if of_bias else None, None, None


def rows(x: Tensor, first: int, stride: int, count: int) -> Tensor:
    """`count` rows of (T, C), each `stride` behind the last: a view."""
    return x[first : first + (count - 1) * stride + 1 : stride]
