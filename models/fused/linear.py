"""A linear layer in fp32 on the CPU, by oneDNN where that is faster than MKL, which torch would ask.

oneDNN adds the bias on the way. On one AMD processor it was a fifth faster, input's gradient included; on two without
AVX-512 MKL was, by up to a tenth forward and by more in the gradient (benchmarks/README.md). So AVX-512 decides; other
kinds of processors were not measured. The plain twin is `torch.nn.Linear`, which this is on other devices, in other
precisions, and in a torch without the operator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FASTER = AVAILABLE and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight' + bias: (..., I), (O, I), (O,) -> (..., O)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """`product` with its gradient, which torch has no formula for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        to_x = product(rows, weight.t(), None).view_as(x) if of_x else None
        to_weight = rows.t() @ x.flatten(0, -2) if of_weight else None
        return to_x, to_weight, rows.sum(0) if of_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear`, by whatever is fastest here."""
    plain = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()  # which does not know the operator
    if FASTER and x.device.type == "cpu" and x.dtype == torch.float32 and not plain:
        return Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` with a bias; the same parameters, the same function."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
