"""What kernels have to be: their float64 twins, in values and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2**-9, "atol": 2**-8},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-5},
}


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def doubles(given: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in given]


def same(
    y: Tensor, given: Sequence[Tensor], plain: Tensor, twin: Sequence[Tensor], dtype: torch.dtype | None = None
) -> None:
    """y and its gradients for what is given are those of its float64 twin."""
    close = CLOSE[dtype or y.dtype]
    torch.testing.assert_close(y.double(), plain, **close)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, given, upstream)
    for own, gradient, expected in zip(
        given, gradients, torch.autograd.grad(plain, twin, upstream.double()), strict=True
    ):
        assert gradient.dtype == own.dtype
        torch.testing.assert_close(gradient.double(), expected, **close)
