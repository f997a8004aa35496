"""MAE (He et al., CVPR 2022, arXiv 2111.06377): pixels of hidden patches from the visible ones (docs/method.md 5)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from models.baselines.encoder import Baseline, BorrowedEncoder, Summed, ours, sizes
from models.config import ModelConfig
from models.data2vec import Batch, ExtraTokens
from models.image import PatchEmbedding, SinCosPositions, sincos_positions
from models.masks import gather_rows


class MaeEncoder(BorrowedEncoder):
    """Pre-norm blocks over what is visible, behind a class token. `leave`, their last LayerNorm, is for decoder and
    probes; fine-tuning's head has its own, as published."""

    leading = 1

    def __init__(self, config: ModelConfig, vit: ViTMAEModel) -> None:
        super().__init__()
        self.local = PatchEmbedding(config)
        self.positions = SinCosPositions(config)
        self.extra_tokens = ExtraTokens(1, config.width)
        self.blocks = vit.layers
        self.norm = vit.layernorm
        nn.init.normal_(self.extra_tokens.weight, std=0.02)
        init_as_published(self.blocks)

    def enter(self, features: Tensor, ids_keep: Tensor | None) -> Tensor:
        return self.extra_tokens(self.positions(features, ids_keep))

    def leave(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Mae(Baseline):
    """Encoder of the visible patches, decoder of all."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        net = ours(ViTMAEForPreTraining(settings(config)))
        self.student = MaeEncoder(config, net.vit)
        self.decoder = net.decoder
        init_as_published(self.decoder)
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        # transformers 5 begins with zeros here, by which all hidden patches would look alike.
        positions = sincos_positions(config.mae.width, config.image.grid)
        table = torch.cat([positions.new_zeros(1, config.mae.width), positions])[None]
        del self.decoder.decoder_pos_embed
        self.decoder.register_buffer("decoder_pos_embed", table, persistent=False)

    def learn(self, batch: Batch, dropped: Collection[int]) -> Summed:
        """Squared error, meant over a patch and summed over hidden patches."""
        local = self.student.local
        pixels = local.normalise(batch.inputs)
        encoded = self.student.leave(self.student(local(pixels), batch.ids_keep, dropped=dropped))
        restore = torch.cat([batch.ids_keep, batch.ids_mask], dim=1).argsort(dim=1)
        prediction = gather_rows(self.decoder(encoded, restore).logits, batch.ids_mask).float()
        target = gather_rows(patches(pixels.float(), self.config.image.patch), batch.ids_mask)
        if self.config.mae.normalise:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return Summed((prediction - target).square().mean(dim=-1).sum(), {})


def init_as_published(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear below; transformers has N(0, 0.02)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)


def patches(pixels: Tensor, edge: int) -> Tensor:
    """(B, C, H, W) -> (B, T, edge * edge * C), row after row, channels last."""
    cut = pixels.unflatten(3, (-1, edge)).unflatten(2, (-1, edge))  # (B, C, rows, edge, columns, edge)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def settings(config: ModelConfig) -> ViTMAEConfig:
    mae, dropout = config.mae, config.dropout
    return ViTMAEConfig(
        **sizes(config),
        hidden_dropout_prob=dropout.residual,
        attention_probs_dropout_prob=dropout.attention,
        image_size=config.image.size,
        patch_size=config.image.patch,
        num_channels=config.image.channels,
        mask_ratio=config.mask.prob,
        norm_pix_loss=mae.normalise,
        decoder_hidden_size=mae.width,
        decoder_num_hidden_layers=mae.depth,
        decoder_num_attention_heads=mae.heads,
        decoder_intermediate_size=4 * mae.width,
    )


def encoder(config: ModelConfig) -> MaeEncoder:
    return MaeEncoder(config, ours(ViTMAEModel(settings(config))))


network = Mae
