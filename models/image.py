"""Images: what turns pixels into local features, and the fixed positions of the patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.masks import gather_rows


class PatchEmbedding(nn.Module):
    """One convolution whose kernel and stride are the patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        image = config.image
        self.proj = nn.Conv2d(image.channels, config.width, kernel_size=image.patch, stride=image.patch)
        nn.init.xavier_uniform_(self.proj.weight.view(config.width, -1))
        # Not buffers: an engine that casts the module to bf16 would round the mean 123.675 to 123.5. Of a model without
        # numbers, too, on the CPU: torch imports its compiler for arithmetic on the meta device.
        self.mean = 255 * torch.tensor(image.mean, device="cpu").view(-1, 1, 1)
        self.std = 255 * torch.tensor(image.std, device="cpu").view(-1, 1, 1)

    def forward(self, pixels: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, T, D)."""
        return self.proj(self.normalise(pixels).to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 pixels with the config's mean and deviation taken out; floats are taken as they are."""
        if pixels.dtype != torch.uint8:
            return pixels
        self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)  # moves once
        return (pixels - self.mean) / self.std


class SinCosPositions(nn.Module):
    """Fixed 2-D sin-cos positions, added before what is kept is taken. On another grid than the one that they were
    learned on they are those of its cells' centres there."""

    table: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        image = config.image
        self.register_buffer("table", sincos_positions(config.width, image.grid, image.positions), persistent=False)

    def forward(self, features: Tensor, ids_keep: Tensor | None, ends: Tensor | None = None) -> Tensor:
        return gather_rows(features + self.table.to(features.dtype), ids_keep)


def sincos_positions(width: int, grid: int, known: int = 0) -> Tensor:
    """(grid*grid, width) fixed 2-D sin-cos positions of MAE (He et al. 2021): x in the first half, y in the second.

    `known`: the side of another grid, over which this one is laid. The sines are evaluated between its cells, exactly,
    where interpolating its table would round off the fast ones. Always on the CPU, as `PatchEmbedding.mean`.
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4))
    place = (torch.arange(grid, dtype=torch.float64, device="cpu") + 0.5) * ((known or grid) / grid) - 0.5
    angle = place[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    x = axis[None, :, :].expand(grid, grid, -1)
    y = axis[:, None, :].expand(grid, grid, -1)
    return torch.cat([x, y], dim=2).reshape(grid * grid, width).float()
