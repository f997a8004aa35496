"""Text: token embeddings with learned positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.masks import gather_rows

FIRST_POSITION = 2  # rows 0 and 1 of the table are not used, as in RoBERTa's


class TokenEmbedding(nn.Module):
    """Token + position embeddings, not scaled, then LayerNorm and dropout. What is padding gets neither."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text, width = config.text, config.width
        self.tokens = nn.Embedding(text.vocabulary, width, padding_idx=text.pad)
        self.positions = nn.Embedding(text.tokens + FIRST_POSITION, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout.embedding)
        with torch.no_grad():
            for table, zero in ((self.tokens.weight, text.pad), (self.positions.weight, FIRST_POSITION - 1)):
                table.normal_(std=0.02)
                table[zero] = 0

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T) token ids, of which `lengths` (B,) are no padding -> (B, T, D)."""
        t = ids.shape[1]
        places = torch.arange(FIRST_POSITION, FIRST_POSITION + t, device=ids.device)
        x = self.tokens(ids) + self.positions(places)
        if lengths is not None:
            x = x * (torch.arange(t, device=ids.device) < lengths[:, None])[..., None]
        return self.dropout(self.norm(x))


class InFeatures(nn.Module):
    """Positions that the local features have in them already: what is kept is taken, nothing added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, features: Tensor, ids_keep: Tensor | None, ends: Tensor | None = None) -> Tensor:
        return gather_rows(features, ids_keep)
