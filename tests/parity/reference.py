"""The reference's vocabulary in ours: configuration keys and parameter names of its image models."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from models.config import DecoderConfig, ImageConfig, LossConfig, MaskConfig, ModelConfig, TargetConfig
from pretrain.config import Config, EmaConfig, OptimConfig, TrainConfig

# Reference name -> ours, below "student." or "teacher."; `\1` is the block or layer number.
IMAGE_NAMES = (
    (r"modality_encoders\.IMAGE\.extra_tokens", r"extra_tokens"),
    (r"modality_encoders\.IMAGE\.local_encoder\.proj\.(.*)", r"local.proj.\1"),
    (r"modality_encoders\.IMAGE\.context_encoder\.norm\.(.*)", r"context_norm.\1"),
    (r"modality_encoders\.IMAGE\.context_encoder\.blocks\.(.*)", r"prenet.\1"),
    (r"blocks\.(.*)", r"blocks.\1"),
)
DECODER_NAMES = (
    (r"modality_encoders\.IMAGE\.decoder\.blocks\.(\d+)\.0\.(.*)", r"decoder.convs.\1.\2"),
    (r"modality_encoders\.IMAGE\.decoder\.proj\.(.*)", r"decoder.proj.\1"),
)
DERIVED = (r"modality_encoders\.IMAGE\.fixed_positional_encoder\.positions",)  # computed here, never loaded


def our_name(name: str, owner: str) -> str | None:
    """Our name of a reference parameter of the "student" or "teacher"; None for what we derive; KeyError if unknown."""
    if any(re.fullmatch(pattern, name) for pattern in DERIVED):
        return None
    rules = [(p, f"{owner}.{r}") for p, r in IMAGE_NAMES] + list(DECODER_NAMES if owner == "student" else ())
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise KeyError(f"no {owner} parameter of ours corresponds to the reference's {name}")


def renamed(tensors: dict[str, Tensor], prefix: str, owner: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, under our names."""
    out = {}
    for key, value in tensors.items():
        if key.startswith(prefix) and (name := our_name(key.removeprefix(prefix), owner)):
            out[name] = value
    return out


def our_config(case: dict[str, Any], lr: float, stage: int, exempt_1d: bool) -> Config:
    """The configuration of an image case, from the complete resolved one of the reference."""
    ref = case["config"]["model"]
    image = ref["modalities"]["image"]
    decoder = image["decoder"]
    optimizer = case["optimizer_groups_as_code_builds_them"][0]
    channels = image["in_chans"]
    rows = case["batch"] * case["clone_batch"]
    model = ModelConfig(
        width=ref["embed_dim"],
        heads=ref["num_heads"],
        prenet_depth=image["prenet_depth"],
        depth=ref["depth"],
        mlp_ratio=ref["mlp_ratio"],
        norm_eps=ref["norm_eps"],
        extra_tokens=image["num_extra_tokens"],
        num_masks=ref["clone_batch"],
        image=ImageConfig(image["input_size"], image["patch_size"], channels, (0.5,) * channels, (0.5,) * channels),
        mask=MaskConfig(
            image["mask_prob"],
            image["mask_prob_adjust"],
            image["mask_length"],
            image["inverse_mask"],
            image["mask_noise_std"],
        ),
        decoder=DecoderConfig(
            decoder["decoder_dim"],
            decoder["decoder_groups"],
            decoder["decoder_kernel"],
            decoder["decoder_layers"],
            decoder["decoder_residual"],
        ),
        targets=TargetConfig(
            ref["average_top_k_layers"],
            ref["instance_norm_target_layer"],
            ref["layer_norm_target_layer"],
            ref["layer_norm_targets"],
            ref["instance_norm_targets"],
        ),
        loss=LossConfig(ref["loss_scale"], ref["loss_beta"], ref["cls_loss"], rows),
    )
    optim = OptimConfig(
        lr=lr,
        betas=tuple(optimizer["betas"]),
        eps=optimizer["eps"],
        weight_decay=optimizer["wd"],
        exempt_1d=exempt_1d,
        clip_norm=case["clip_norm"] or 0.0,
        warmup_steps=0,
    )
    return Config(
        model=model,
        optim=optim,
        ema=EmaConfig(ref["ema_decay"], ref["ema_end_decay"], ref["ema_anneal_end_step"]),
        # A cosine this long is constant, as the cases' learning rate is.
        train=TrainConfig(10**15, case["batch"], None, case["seed"], "fp32", f"ds_configs/zero{stage}.json"),
    )
