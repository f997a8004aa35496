"""Mean and squared deviations of columns, tile by tile, in Triton. Imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pool_tile(y, real, count, n, mean, m2):  # type: ignore[no-untyped-def]
    """(mean, m2) of the n rows seen, each (C,), together with a tile y (R, C) whose first `count` rows are `real`, as
    Chan, Golub & LeVeque (1979) pool them: nothing cancels, however far the values lie from 0."""
    own = tl.sum(tl.where(real, y, 0.0), 0) / tl.maximum(count, 1.0)
    apart = tl.where(real, y - own[None, :], 0.0)
    delta = own - mean
    share = count / (n + count)
    return mean + delta * share, m2 + tl.sum(apart * apart, 0) + delta * delta * (n * share)
