"""Speech: what turns a 16 kHz waveform into 50 frames a second, and the relative positions of the frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.convolution import RowsConv1d, conv_norm_gelu, convolve
from models.fused.grouped import GroupedConv1d
from models.fused.linear import Linear
from models.fused.norm_gelu import NormGelu
from models.masks import gather_rows, real_positions, scatter_rows


class WaveformEncoder(nn.Module):
    """Strided convolutions without bias, each followed by LayerNorm over channels and GELU; LayerNorm, Linear to D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        audio = config.audio
        widths = [1] + [audio.channels] * len(audio.kernels)
        self.convs = nn.ModuleList(
            RowsConv1d(c_in, audio.channels, kernel, stride, bias=False)
            for c_in, kernel, stride in zip(widths, audio.kernels, audio.strides, strict=False)
        )
        self.norms = nn.ModuleList(NormGelu(audio.channels) for _ in self.convs)
        self.norm = nn.LayerNorm(audio.channels)
        self.proj = Linear(audio.channels, config.width)  # initialised as PyTorch does (docs/method.md 2)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]

    def forward(self, waveform: Tensor, lengths: Tensor | None = None, frozen: bool = False) -> Tensor:
        """(B, samples), mean 0 and variance 1 -> (B, T, D). `frozen`: the convolutions take no gradient."""
        x = waveform.to(self.proj.weight.dtype)[..., None]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = norm(convolve(conv, x, (x.shape[1],)))
        return self.proj(self.norm(x))


class RelativePositions(nn.Module):
    """What a stack of convolutions makes of the frames around each one, those that are hidden being zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, audio = config.width, config.audio
        kernel = audio.position_kernel
        self.convs = nn.ModuleList(
            GroupedConv1d(width, width, kernel, padding=kernel // 2, groups=audio.position_groups)
            for _ in range(audio.position_layers)
        )

    def forward(self, features: Tensor, ids_keep: Tensor | None, ends: Tensor | None = None) -> Tensor:
        """(B, T, D) and (B*M, K) -> (B*M, K, D): what is kept, plus its positions; all T without ids.

        If `ends` (B,) are given, with all T alone, each layer sees zeros from there on, as where a clip that is not
        padded ends; the reference lets every layer but the first see what the one before made of padding.
        """
        kept = gather_rows(features, ids_keep)
        t = features.shape[1]
        x = features if ids_keep is None else scatter_rows(kept, ids_keep, t)
        real = None if ends is None else real_positions(x, ends)
        for conv in self.convs:
            x = conv_norm_gelu(conv, x, (t,))
            x = x if real is None else x * real
        return kept + gather_rows(x, ids_keep)
