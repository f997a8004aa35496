"""Fine-tuned networks: the student's encoder on the full input, no masks, no teacher, and a head (docs/method.md 4).

Shapes: B samples, T positions, D width, C outputs: classes, letters, or one number to regress.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models.config import HeadConfig, ModelConfig
from models.data2vec import dropped_blocks
from models.fused.linear import Linear
from models.masks import without_padding
from models.objectives import encoder


class PooledHead(nn.Module):
    """Images: the mean over patches, LayerNorm, Linear. (B, T, D) -> (B, C)."""

    def __init__(self, config: ModelConfig, head: HeadConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.dropout = nn.Dropout(head.dropout)
        self.linear = Linear(config.width, head.outputs)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, positions: Tensor) -> Tensor:
        return self.linear(self.dropout(self.norm(positions.mean(dim=1))))


class FrameHead(nn.Module):
    """Speech: a Linear on every frame. (B, T, D) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, head: HeadConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(head.dropout)
        self.linear = Linear(config.width, head.outputs)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, positions: Tensor) -> Tensor:
        return self.linear(self.dropout(positions))


class FirstTokenHead(nn.Module):
    """Text: dropout, Linear, tanh, dropout, Linear on the first token. (B, T, D) -> (B, C)."""

    def __init__(self, config: ModelConfig, head: HeadConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(head.dropout)
        self.dense = Linear(config.width, config.width)
        self.linear = Linear(config.width, head.outputs)
        for layer in (self.dense, self.linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, positions: Tensor) -> Tensor:
        hidden = self.dense(self.dropout(positions[:, 0])).tanh()
        return self.linear(self.dropout(hidden))


HEADS: dict[str, type[nn.Module]] = {"image": PooledHead, "audio": FrameHead, "text": FirstTokenHead}


class FineTuned(nn.Module):
    """An encoder, whose parameters have the names of the pre-trained student's, and a head."""

    def __init__(self, config: ModelConfig, head: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.student = encoder(config)
        self.head = HEADS[config.modality](config, head)

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor | None = None,
        *,
        frozen: bool = False,
        frozen_local: bool = False,
        seed: int = 0,
        hidden: Tensor | None = None,
        channels: Tensor | None = None,
    ) -> Tensor:
        """Inputs as pre-training's batches have them, `lengths` (B,) in positions if some are padded -> outputs. What
        is made of a sample does not depend on how far it is padded.

        `frozen`: only the head learns; `frozen_local`: a waveform's convolutions do not. `seed` chooses the blocks that
        layer drop leaves out; give the same to all ranks. Local features are zero where `hidden` (B, T), as what is
        hidden is to the positions in pre-training, and in `channels` (B, D).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            local = partial(self.student.local, frozen=True) if frozen_local else self.student.local
            features = local(inputs, lengths)
            if hidden is not None:
                features = features.masked_fill(hidden[..., None], 0)
            if channels is not None:
                features = features.masked_fill(channels[:, None], 0)
            features = without_padding(features, lengths)
            dropped = dropped_blocks(self.config, seed) if self.training else ()
            states = self.student(features, lengths=lengths, dropped=dropped, ends=lengths)
        return self.head(states[:, self.config.extra_tokens :])
