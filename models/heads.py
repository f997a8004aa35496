"""Fine-tuned networks: the student's encoder on the full input, no masks, no teacher, and a head (docs/method.md 5).

Shapes: B samples, T positions, D width, C outputs: classes, letters, or one number to regress.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import HeadConfig, ModelConfig
from models.data2vec import Encoder
from models.fused.linear import Linear
from models.masks import real_positions


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
        self.student = Encoder(config)
        self.head = HEADS[config.modality](config, head)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Inputs as pre-training's batches have them, `lengths` (B,) in positions if some are padded -> outputs.

        `frozen`: only the head learns.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = self.student.local(inputs, lengths)
            if lengths is not None:
                features = features * real_positions(features, lengths)
            states = self.student(features, lengths=lengths)[:, self.config.extra_tokens :]
        return self.head(states)
