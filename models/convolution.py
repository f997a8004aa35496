"""The convolutional layer that decoder, relative positions and waveform encoder are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.fused import grouped, kernels, taps
from models.fused.linear import linear
from models.fused.norm_gelu import norm_gelu
from models.masks import gather_rows


def convolve(conv: nn.Module, x: Tensor, shape: tuple[int, ...], ids: Tensor | None = None) -> Tensor:
    """`conv` on (N, T, C) over a grid of `shape`, prod(shape) = T -> (N, T', C'), or (N, P, C') at `ids` (N, P) alone.

    Activations stay channels-last throughout. A 2-D convolution sees a permuted view of them, which is exactly the
    layout it is fastest in. In 1-D torch transposes on GPUs; in fp32 on the CPU rows pass for a picture of one line
    (`fused/taps.py`). The kernels of grouped convolutions, where they are chosen, take the rows as they are.
    """
    if isinstance(conv, RowsConv1d):
        return conv(x, ids)
    n, _, c = x.shape
    if kernels.triton("grouped", x) and grouped.applicable(conv):
        return gather_rows(conv(x, shape), ids)
    y = conv(x.view(n, *shape, c).movedim(-1, 1))
    return gather_rows(y.movedim(1, -1).reshape(n, -1, y.shape[1]), ids)


class RowsConv1d(nn.Conv1d):
    """`nn.Conv1d` without groups for channels-last rows. Where only some positions are asked for it is one matrix
    product over windows, so that the others are not computed; that takes a bias."""

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """(N, T, C) -> (N, T', C'), or (N, P, C') at `ids` (N, P)."""
        if ids is not None:
            assert self.bias is not None
            return linear(windows(x, ids, self.kernel_size[0]), self.weight.transpose(1, 2).flatten(1), self.bias)
        if taps.applicable(self, x):
            return taps.convolve(x, self)
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def windows(x: Tensor, ids: Tensor, kernel: int) -> Tensor:
    """The `kernel` positions (odd) around each of `ids` (N, P), zero beyond the ends: (N, T, C) -> (N, P, kernel*C)."""
    padded = F.pad(x, (0, 0, kernel // 2, kernel // 2))
    n, length, c = padded.shape
    first = ids + torch.arange(n, device=ids.device)[:, None] * length
    rows = first[..., None] + torch.arange(kernel, device=ids.device)
    return padded.flatten(0, 1).index_select(0, rows.flatten()).view(*ids.shape, kernel * c)


def conv_norm_gelu(
    conv: nn.Module, x: Tensor, shape: tuple[int, ...], ids: Tensor | None = None, residual: bool = False
) -> Tensor:
    """Convolution, LayerNorm over channels without affine (eps 1e-5), GELU, and with `residual` plus x where widths
    agree; at `ids` (N, P) alone if they are given."""
    y = convolve(conv, x, shape, ids)
    added = gather_rows(x, ids) if residual and x.shape[-1] == y.shape[-1] else None
    return norm_gelu(y, residual=added)
