"""The convolutional layer that decoder, relative positions and waveform encoder are made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def convolve(conv: nn.Module, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`conv` on (N, T, C) over a grid of `shape`, prod(shape) = T -> (N, T', C').

    Activations stay channels-last throughout. The convolution sees a permuted view of them, which is exactly the layout
    it is fastest in, so nothing is ever transposed in memory.
    """
    n, _, c = x.shape
    y = conv(x.view(n, *shape, c).movedim(-1, 1))
    return y.movedim(1, -1).reshape(n, -1, y.shape[1])


def conv_norm_gelu(conv: nn.Module, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Convolution, LayerNorm over channels without affine (eps 1e-5), GELU."""
    y = convolve(conv, x, shape)
    return F.gelu(F.layer_norm(y, y.shape[-1:]))
