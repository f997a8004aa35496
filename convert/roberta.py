"""Text encoders as RoBERTa's, which have the same blocks: names, one table read in both directions, and config.

RoBERTa splits qkv, has an embedding for the kind of token, which is zero here, and gives position p the row
p + pad + 1 of its table, where here it is p + 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import HeadConfig, ModelConfig
from models.text import FIRST_POSITION
from pretrain.settings import ConfigError

EMBEDDING_EPS = 1e-5  # of the norm behind the embeddings
KINDS = "embeddings.token_type_embeddings.weight"
POSITIONS = "local.positions.weight"
QKV = ("query", "key", "value")
EMBEDDINGS = {
    "local.tokens": "embeddings.word_embeddings",
    "local.positions": "embeddings.position_embeddings",
    "local.norm": "embeddings.LayerNorm",
}
BLOCK = {  # what follows blocks.{n} here, and encoder.layer.{n} there
    "attn.qkv": "attention.self",
    "attn.proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
HEAD = {"head.dense": "classifier.dense", "head.linear": "classifier.out_proj"}


def config(model: ModelConfig, head: HeadConfig | None) -> dict[str, Any]:
    """What config.json says. Raises ConfigError for a model that RoBERTa cannot be."""
    if model.norm_eps != EMBEDDING_EPS:
        raise ConfigError(
            f"model.norm_eps={model.norm_eps}: RoBERTa has one for all its norms, and that of the embeddings is "
            f"{EMBEDDING_EPS} here; only models of norm_eps={EMBEDDING_EPS} can be exported"
        )
    out: dict[str, Any] = {
        "model_type": "roberta",
        "architectures": ["RobertaModel" if head is None else "RobertaForSequenceClassification"],
        "vocab_size": model.text.vocabulary,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": model.dropout.residual,
        "attention_probs_dropout_prob": model.dropout.attention,
        "layer_norm_eps": model.norm_eps,
        "max_position_embeddings": model.text.tokens + max(FIRST_POSITION, model.text.pad + 1),
        "type_vocab_size": 1,
        "pad_token_id": model.text.pad,
    }
    if head is not None:
        out["classifier_dropout"] = head.dropout
        out["problem_type"] = "regression" if head.outputs == 1 else "single_label_classification"
    return out


def names(model: ModelConfig, head: HeadConfig | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name here, without its owner but for `head.`; the one name there, or those of what it is split into)."""
    prefix = "" if head is None else "roberta."
    pairs: dict[str, tuple[str, ...]] = {ours: (prefix + theirs,) for ours, theirs in EMBEDDINGS.items()}
    for n in range(model.depth):
        layer = f"{prefix}encoder.layer.{n}"
        for ours, theirs in BLOCK.items():
            parts = tuple(f"{theirs}.{part}" for part in QKV) if ours == "attn.qkv" else (theirs,)
            pairs[f"blocks.{n}.{ours}"] = tuple(f"{layer}.{part}" for part in parts)
    pairs |= {ours: (theirs,) for ours, theirs in HEAD.items()} if head is not None else {}
    for ours, several in pairs.items():
        for kind in ("weight",) if ours in ("local.tokens", "local.positions") else ("weight", "bias"):
            yield f"{ours}.{kind}", tuple(f"{theirs}.{kind}" for theirs in several)


def theirs(tensors: Mapping[str, Tensor], model: ModelConfig, head: HeadConfig | None) -> dict[str, Tensor]:
    """Tensors of an `models.data2vec.Encoder`, and `head.*`, under RoBERTa's names."""
    out = {("" if head is None else "roberta.") + KINDS: torch.zeros(1, model.width)}
    for name, several in names(model, head):
        tensor = tensors[name]
        if name == POSITIONS:
            later = model.text.pad + 1 - FIRST_POSITION
            tensor = tensor.roll(later, 0) if later < 0 else F.pad(tensor, (0, 0, later, 0))
        out |= zip(several, tensor.chunk(len(several)), strict=True)
    return out


def ours(tensors: Mapping[str, Tensor], model: ModelConfig, head: HeadConfig | None) -> dict[str, Tensor]:
    """The way back; what has no place here keeps its name. Raises ConfigError for kinds of tokens that are not zero."""
    rest = dict(tensors)
    kinds = rest.pop(("" if head is None else "roberta.") + KINDS, None)
    if kinds is not None and kinds.any():
        raise ConfigError(f"{KINDS} is not zero; here tokens are of one kind, which has no embedding")
    out = {}
    for name, several in names(model, head):
        if not all(part in rest for part in several):
            continue
        tensor = torch.cat([rest.pop(part) for part in several])
        if name == POSITIONS:
            later = model.text.pad + 1 - FIRST_POSITION
            tensor = tensor.roll(-later, 0) if later < 0 else tensor[later:]
        out[name] = tensor.contiguous()
    return out | rest
