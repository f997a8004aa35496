"""A linear layer in fp32 on the CPU: oneDNN where torch would ask MKL, and a GELU before it that is not kept.

oneDNN adds the bias on the way, and on some AMD processors is a fifth faster. Where it has no AVX-512 it multiplies by
a transposed matrix, which the gradient of the input is, at half to four fifths of MKL's rate: there MKL does that
(benchmarks/README.md). The plain twin is `torch.nn.Linear`, which this is on other devices, in other precisions, and in
a torch without the operator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
TRANSPOSED = torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight' + bias: (..., I), (O, I), (O,) -> (..., O)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """`product` of x or of GELU(x), with its gradient, which torch has no formula for. Saves x alone: GELU is a small
    part of a product, and what it gives is as large as all else that attention keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gelu = gelu
        return product(F.gelu(x) if gelu else x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        to_x = to_weight = None
        if of_weight:
            to_weight = rows.t() @ (F.gelu(inputs) if ctx.gelu else inputs)
        if of_x:
            to_x = product(rows, weight.t(), None) if TRANSPOSED else rows @ weight
            if ctx.gelu:
                torch.ops.aten.gelu_backward.grad_input(to_x, inputs, grad_input=to_x)
            to_x = to_x.view_as(x)
        return to_x, to_weight, rows.sum(0) if of_bias else None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """`F.linear` of x, or of GELU(x), by whatever is fastest here."""
    plain = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()  # which does not know the operator
    if AVAILABLE and x.device.type == "cpu" and x.dtype == torch.float32 and not plain:
        return Product.apply(x, weight, bias, gelu)
    return F.linear(F.gelu(x) if gelu else x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` with a bias; the same parameters, the same function, with `gelu` of GELU(x)."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        return linear(x, self.weight, self.bias, gelu)
