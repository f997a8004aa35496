"""The light decoder: convolutions over the full length, noise where positions were hidden."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from models.config import ModelConfig
from models.convolution import RowsConv1d, conv_norm_gelu
from models.encoder import init_linear
from models.fused.grouped import GroupedConv1d, GroupedConv2d
from models.fused.linear import Linear
from models.masks import gather_rows

CONV: dict[int, type[nn.Module]] = {1: GroupedConv1d, 2: GroupedConv2d}


class Decoder(nn.Module):
    """`layers` x {grouped convolution -> LayerNorm over channels, no affine -> GELU, + input where widths agree}, then
    a projection to D (docs/method.md 1.4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        decoder = config.decoder
        self.grid_shape = config.grid_shape
        self.residual = decoder.residual
        conv = CONV[len(self.grid_shape)] if decoder.groups > 1 or len(self.grid_shape) > 1 else RowsConv1d
        widths = [config.width] + [decoder.width] * decoder.layers
        self.convs = nn.ModuleList(
            conv(c_in, c_out, decoder.kernel, padding=decoder.kernel // 2, groups=decoder.groups)
            for c_in, c_out in pairwise(widths)
        )
        self.proj: nn.Module
        if decoder.projection_layers == 1:
            self.proj = Linear(widths[-1], config.width)  # initialised as PyTorch does (docs/method.md 2)
        else:
            wide = 2 * widths[-1]
            self.proj = nn.Sequential(Linear(widths[-1], wide), nn.GELU(), Linear(wide, config.width))
            init_linear(self.proj)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """(N, T, D) -> (N, T, C), or (N, P, C) where `ids` (N, P) want it: everything but the projection."""
        shape = self.grid_shape if len(self.grid_shape) > 1 else (x.shape[1],)
        for i, conv in enumerate(self.convs, 1):
            wanted = ids if i == len(self.convs) else None
            x = conv_norm_gelu(conv, x, shape, wanted, self.residual)
        return x if len(self.convs) else gather_rows(x, ids)
