"""wav2vec 2.0 (Baevski et al., NeurIPS 2020, arXiv 2006.11477): the quantised frame among others (docs/method.md 5).

n counts the hidden frames of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining, Wav2Vec2Model

from models.baselines.batch import Hidden
from models.baselines.encoder import Baseline, BorrowedEncoder, Summed, ours, sizes
from models.config import ModelConfig


class Convolutions(nn.Module):
    """Strided convolutions, each followed by LayerNorm and GELU; LayerNorm, Linear, dropout."""

    def __init__(self, net: Wav2Vec2Model) -> None:
        super().__init__()
        self.convs: Any = net.feature_extractor.conv_layers
        self.projection: Any = net.feature_projection

    def convolved(self, waveform: Tensor) -> Tensor:
        """(B, samples), mean 0 and variance 1 -> (B, T, channels)."""
        x = waveform.to(self.projection.projection.weight.dtype)[:, None]
        for conv in self.convs:
            x = conv(x)
        return x.transpose(1, 2)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None, frozen: bool = False) -> Tensor:
        """(B, samples) -> (B, T, D). `frozen`: the convolutions take no gradient."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            x = self.convolved(waveform)
        return self.projection(x)[0]


class Wav2Vec2Encoder(BorrowedEncoder):
    """Relative positions from one convolution, LayerNorm, dropout, post-norm blocks."""

    def __init__(self, net: Wav2Vec2Model) -> None:
        super().__init__()
        self.local = Convolutions(net)
        self.positions: Any = net.encoder.pos_conv_embed
        self.norm, self.dropout = net.encoder.layer_norm, net.encoder.dropout
        self.blocks = net.encoder.layers

    def enter(self, features: Tensor, ids_keep: Tensor | None) -> Tensor:
        return self.dropout(self.norm(features + self.positions(features)))


class Wav2Vec2(Baseline):
    """Encoder of all frames, of which hidden ones are a learned vector; quantiser of the hidden ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        net = ours(Wav2Vec2ForPreTraining(settings(config)))
        self.student = Wav2Vec2Encoder(net.wav2vec2)
        self.mask_token = net.wav2vec2.masked_spec_embed
        self.feature_dropout = net.dropout_features
        self.quantizer: Any = net.quantizer
        self.project_hid, self.project_q = net.project_hid, net.project_q

    @property
    def temperature(self) -> float:
        start, least, factor = self.config.wav2vec2.temperature
        return max(start * factor**self.step, least)

    def learn(self, batch: Hidden, dropped: Collection[int]) -> Summed:
        """Contrastive loss, summed over hidden frames, and n times the losses that a micro-batch has as a whole, as
        published: diversity of the codes, and the mean square of what the convolutions make."""
        wav, local = self.config.wav2vec2, self.student.local
        convolved = scaled_gradient(local.convolved(batch.inputs), wav.feature_gradient)
        features, normed = local.projection(convolved)
        hidden = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        hidden.view(-1)[batch.places] = True
        encoded = self.student(
            torch.where(hidden[..., None], self.mask_token.to(features.dtype), features), dropped=dropped
        )
        context = self.project_hid(encoded.flatten(0, 1)[batch.places])
        quantised, codes, perplexity = self.quantise(self.feature_dropout(normed).flatten(0, 1)[batch.places])
        logits = similarities(context, self.project_q(quantised), codes, batch.truth) / wav.logit_temperature
        contrastive = F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64), reduction="sum")
        diversity = 1 - perplexity / (wav.groups * wav.codes)
        penalty = convolved.float().square().mean()
        loss = contrastive + len(logits) * (wav.diversity * diversity + wav.penalty * penalty)
        right = (logits.argmax(dim=1) == 0).sum()
        figures = {"contrastive": contrastive, "accuracy": right, "perplexity": perplexity * len(logits)}
        return Summed(loss, {name: figure.detach().float() for name, figure in figures.items()})

    def quantise(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, channels) -> code vectors (n, width), which codes they are (n, groups), and over how many codes the
        features are spread: the groups' perplexities, summed. While training, codes are drawn."""
        wav = self.config.wav2vec2
        logits = self.quantizer.weight_proj(features).float().unflatten(1, (wav.groups, wav.codes))
        if self.training:
            chosen = F.gumbel_softmax(logits, tau=self.temperature, hard=True)
            spread = logits.softmax(dim=-1).mean(dim=0)
        else:
            chosen = F.one_hot(logits.argmax(dim=-1), wav.codes).float()
            spread = chosen.mean(dim=0)
        vectors = self.quantizer.codevectors.view(wav.groups, wav.codes, -1)
        found = torch.einsum("ngv,gvd->ngd", chosen.to(vectors.dtype), vectors).flatten(1)
        perplexity = (-torch.xlogy(spread, spread).sum(dim=-1)).exp().sum()
        return found, chosen.argmax(dim=-1), perplexity


def similarities(context: Tensor, targets: Tensor, codes: Tensor, negatives: Tensor) -> Tensor:
    """Cosines (n, 1 + K) in fp32 of context (n, P) with its own target of (n, P) and with those of its negatives
    (n, K); -inf where the same codes (n, groups) make the same target."""
    unit, context = F.normalize(targets.float(), dim=-1), F.normalize(context.float(), dim=-1)
    others = torch.einsum("np,nkp->nk", context, unit[negatives])
    same = (codes[negatives] == codes[:, None]).all(dim=-1)
    return torch.cat([(context * unit).sum(dim=-1, keepdim=True), others.masked_fill(same, -torch.inf)], dim=1)


def scaled_gradient(x: Tensor, share: float) -> Tensor:
    """x itself, of whose gradient a share goes on."""
    return x if share == 1 else x * share + x.detach() * (1 - share)


def settings(config: ModelConfig) -> Wav2Vec2Config:
    audio, wav, dropout = config.audio, config.wav2vec2, config.dropout
    return Wav2Vec2Config(
        **sizes(config),
        hidden_dropout=dropout.residual,
        attention_dropout=dropout.attention,
        activation_dropout=dropout.activation,
        feat_proj_dropout=dropout.prenet,
        feat_quantizer_dropout=wav.dropout,
        layerdrop=0.0,  # `dropped` says which blocks, the same on all ranks
        conv_dim=[audio.channels] * len(audio.kernels),
        conv_kernel=list(audio.kernels),
        conv_stride=list(audio.strides),
        conv_bias=False,
        feat_extract_norm="layer",  # as wav2vec 2.0 large and data2vec have it: a clip does not feel its padding
        num_conv_pos_embeddings=wav.position_kernel,
        num_conv_pos_embedding_groups=audio.position_groups,
        num_codevector_groups=wav.groups,
        num_codevectors_per_group=wav.codes,
        codevector_dim=wav.width,
        proj_codevector_dim=wav.width,
        contrastive_logits_temperature=wav.logit_temperature,
        diversity_loss_weight=wav.diversity,
        mask_time_prob=config.mask.prob,
    )


def encoder(config: ModelConfig) -> Wav2Vec2Encoder:
    return Wav2Vec2Encoder(ours(Wav2Vec2Model(settings(config))))


network = Wav2Vec2
