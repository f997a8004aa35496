"""Masked language modelling as RoBERTa has it (Liu et al. 2019, arXiv 1907.11692), docs/method.md 5."""

from __future__ import annotations

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaModel

from models.baselines.batch import Hidden
from models.baselines.encoder import Baseline, BorrowedEncoder, Summed, ours, sizes
from models.config import ModelConfig
from models.fused.linear import linear


class Tokens(nn.Module):
    """Token, position and type embeddings, LayerNorm and dropout. Padding is known by its id."""

    def __init__(self, net: RobertaModel) -> None:
        super().__init__()
        self.embeddings = net.embeddings

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, D)."""
        return self.embeddings(ids)


class RobertaEncoder(BorrowedEncoder):
    """Post-norm blocks on embeddings that have their positions in them."""

    def __init__(self, net: RobertaModel) -> None:
        super().__init__()
        self.local = Tokens(net)
        self.blocks = net.encoder.layer

    def enter(self, features: Tensor, ids_keep: Tensor | None) -> Tensor:
        return features


class MaskedLanguageModel(Baseline):
    """Encoder of all tokens, of which some are replaced; Linear, GELU, LayerNorm and the embeddings again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        net = ours(RobertaForMaskedLM(settings(config)))
        self.student = RobertaEncoder(net.roberta)
        self.dense, self.norm, self.bias = net.lm_head.dense, net.lm_head.layer_norm, net.lm_head.bias

    def learn(self, batch: Hidden, dropped: Collection[int]) -> Summed:
        """Cross-entropy, summed over hidden tokens."""
        encoded = self.student(self.student.local(batch.inputs), dropped=dropped).flatten(0, 1)[batch.places]
        table = self.student.local.embeddings.word_embeddings.weight
        logits = linear(self.norm(F.gelu(self.dense(encoded))), table, self.bias).float()
        right = (logits.argmax(dim=1) == batch.truth).sum()
        return Summed(F.cross_entropy(logits, batch.truth, reduction="sum"), {"accuracy": right.float()})


def settings(config: ModelConfig) -> RobertaConfig:
    text, dropout = config.text, config.dropout
    return RobertaConfig(
        **sizes(config),
        hidden_dropout_prob=dropout.residual,
        attention_probs_dropout_prob=dropout.attention,
        vocab_size=text.vocabulary + (config.mlm.mask_id is None),
        max_position_embeddings=text.tokens + text.pad + 1,
        type_vocab_size=1,
        pad_token_id=text.pad,
        bos_token_id=None,
        eos_token_id=None,
    )


def encoder(config: ModelConfig) -> RobertaEncoder:
    return RobertaEncoder(ours(RobertaModel(settings(config), add_pooling_layer=False)))


network = MaskedLanguageModel
