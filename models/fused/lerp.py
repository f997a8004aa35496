"""An fp32 average moved and its low-precision copy written, in one pass, in Triton: the plain twin is
`torch._foreach_lerp_` and a copy, of which it gives the bits. Compiled and run through Triton's interpreter; not run on
hardware. Imported only where Triton is.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


def lerp(average: Tensor, master: Tensor, weight: float, copy: Tensor) -> None:
    """average += weight * (master - average), both fp32; then copy = average, in the precision of `copy`. All three
    contiguous, of the same size. One launch.

    torch adds to the nearer end, so that a weight of 1 gives the master exactly; the product is not rounded.
    """
    if not (average.is_contiguous() and master.is_contiguous() and copy.is_contiguous()):
        raise ValueError("averages, masters and copies have to be contiguous")
    weight = float(np.float32(weight))
    near = weight < 0.5
    size = average.numel()
    move[(triton.cdiv(size, BLOCK),)](average, master, copy, size, weight if near else weight - 1, near, BLOCK)


@triton.jit(do_not_specialize=["weight"])
def move(average, master, copy, size, weight, NEAR: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(average + at, mask=at < size)
    end = tl.load(master + at, mask=at < size)
    moved = tl.fma(end - start, tl.zeros_like(start) + weight, start if NEAR else end)
    tl.store(average + at, moved, mask=at < size)
    tl.store(copy + at, rounded(moved, copy.dtype.element_ty), mask=at < size)


@triton.jit
def rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """To the nearest value, of two the even one. For bf16 written out: the interpreter would cut bits off."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        out = tl.where(x == x, high, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        out = x.to(dtype)
    return out
