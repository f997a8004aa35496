"""The light decoder: convolutions over the full length, noise where positions were hidden."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.fused.linear import Linear

CONV = {1: nn.Conv1d, 2: nn.Conv2d}


class Decoder(nn.Module):
    """`layers` x {grouped convolution -> LayerNorm over channels, no affine -> GELU, + input where widths agree}, then
    a Linear to D (docs/method.md 1.4).

    Activations stay (N, T, C) throughout. The convolution sees a permuted view of that, which is exactly the
    channels-last layout it is fastest in, so nothing is ever transposed in memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        decoder = config.decoder
        self.grid_shape = config.grid_shape
        self.residual = decoder.residual
        conv = CONV[len(self.grid_shape)]
        widths = [config.width] + [decoder.width] * decoder.layers
        self.convs = nn.ModuleList(
            conv(c_in, c_out, decoder.kernel, padding=decoder.kernel // 2, groups=decoder.groups)
            for c_in, c_out in pairwise(widths)
        )
        self.proj = Linear(widths[-1], config.width)  # with PyTorch's own initialisation, as docs/method.md 2 has it

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, C), everything but the projection, which is wanted at hidden positions only."""
        n, t, _ = x.shape
        for conv in self.convs:
            y = conv(x.view(n, *self.grid_shape, -1).movedim(-1, 1)).movedim(1, -1).reshape(n, t, -1)
            y = F.gelu(F.layer_norm(y, y.shape[-1:]))
            x = x + y if self.residual and x.shape == y.shape else y
        return x
