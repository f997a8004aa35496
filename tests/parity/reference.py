"""The reference's vocabulary in ours: configuration keys and parameter names."""

from __future__ import annotations

import ast
import re
from typing import Any

from torch import Tensor

from models.config import (
    RATE,
    AudioConfig,
    DecoderConfig,
    ImageConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TargetConfig,
    TextConfig,
)
from models.text import FIRST_POSITION
from pretrain.config import Config, EmaConfig, OptimConfig, TrainConfig

# Reference name -> ours, below "student." or "teacher."; `\1` is the block or layer number.
ENCODER_NAMES = (
    (r"extra_tokens", r"extra_tokens.weight"),
    (r"alibi_scale", r"alibi.scale"),
    (r"context_encoder\.norm\.(.*)", r"context_norm.\1"),
    (r"context_encoder\.blocks\.(.*)", r"prenet.\1"),
    (r"relative_positional_encoder\.(\d+)\.0\.(.*)", lambda m: f"positions.convs.{int(m[1]) - 1}.{m[2]}"),
    # images
    (r"local_encoder\.proj\.(.*)", r"local.proj.\1"),
    # audio
    (r"local_encoder\.conv_layers\.(\d+)\.0\.(.*)", r"local.convs.\1.\2"),
    (r"local_encoder\.conv_layers\.(\d+)\.2\.1\.(.*)", r"local.norms.\1.\2"),
    (r"project_features\.1\.(.*)", r"local.norm.\1"),
    (r"project_features\.2\.(.*)", r"local.proj.\1"),
    # text
    (r"local_encoder\.embed_tokens\.(.*)", r"local.tokens.\1"),
    (r"local_encoder\.embed_positions\.(.*)", r"local.positions.\1"),
    (r"local_encoder\.layernorm_embedding\.(.*)", r"local.norm.\1"),
)
DECODER_NAMES = (
    (r"decoder\.blocks\.(\d+)\.0\.(.*)", r"decoder.convs.\1.\2"),
    (r"decoder\.proj\.(.*)", r"decoder.proj.\1"),
)
DERIVED = (r"fixed_positional_encoder\.positions",)  # computed here, never loaded


def our_name(name: str, owner: str) -> str | None:
    """Our name of a reference parameter of the "student" or "teacher"; None for what we derive; KeyError if unknown."""
    if match := re.fullmatch(r"(?:blocks\.)?(\d+\..*)", name):  # where only the blocks are averaged, it drops the word
        return f"{owner}.blocks.{match[1]}"
    inner = re.sub(r"^modality_encoders\.[A-Z]+\.", "", name)
    if any(re.fullmatch(pattern, inner) for pattern in DERIVED):
        return None
    for pattern, replacement in ENCODER_NAMES:
        if match := re.fullmatch(pattern, inner):
            return f"{owner}." + (replacement(match) if callable(replacement) else match.expand(replacement))
    for pattern, replacement in DECODER_NAMES if owner == "student" else ():
        if match := re.fullmatch(pattern, inner):
            return match.expand(replacement)
    raise KeyError(f"no {owner} parameter of ours corresponds to the reference's {name}")


def renamed(tensors: dict[str, Tensor], prefix: str, owner: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, under our names."""
    out = {}
    for key, value in tensors.items():
        if key.startswith(prefix) and (name := our_name(key.removeprefix(prefix), owner)):
            out[name] = value.flatten() if name.endswith("alibi.scale") else value
    return out


def image_config(case: dict[str, Any], encoder: dict[str, Any]) -> ImageConfig:
    channels = encoder["in_chans"]
    return ImageConfig(encoder["input_size"], encoder["patch_size"], channels, (0.5,) * channels, (0.5,) * channels)


def audio_config(case: dict[str, Any], encoder: dict[str, Any]) -> AudioConfig:
    layers = []
    for part in encoder["feature_encoder_spec"].split("+"):  # such as "[(512, 10, 5)] + [(512, 3, 2)] * 4"
        layer, _, times = part.partition("*")
        layers += [ast.literal_eval(layer.strip())[0]] * int(times or 1)
    (channels, *others), kernels, strides = zip(*layers, strict=True)
    assert set(others) <= {channels}
    depth = encoder["conv_pos_depth"]
    return AudioConfig(
        seconds=case["shapes"]["input.source"][1] / RATE,
        channels=channels,
        kernels=kernels,
        strides=strides,
        position_layers=depth,
        position_kernel=max(3, encoder["conv_pos_width"] // depth),
        position_groups=encoder["conv_pos_groups"],
    )


def text_config(case: dict[str, Any], encoder: dict[str, Any]) -> TextConfig:
    tables = [case["shapes"][f"state.modality_encoders.TEXT.local_encoder.embed_{t}.weight"] for t in TABLES]
    return TextConfig(vocabulary=tables[0][0], tokens=tables[1][0] - FIRST_POSITION)


TABLES = ("tokens", "positions")
INPUTS = {"image": image_config, "audio": audio_config, "text": text_config}


def our_config(case: dict[str, Any], lr: float, zero: str, exempt_1d: bool) -> Config:
    """The configuration of a case, from the complete resolved one of the reference."""
    ref = case["config"]["model"]
    modality = case["modality"].lower()
    encoder = ref["modalities"][modality]
    decoder = encoder["decoder"]
    optimizer = case["optimizer_groups_as_code_builds_them"][0]
    rows = case["batch"] * case["clone_batch"]
    model = ModelConfig(
        modality=modality,
        width=ref["embed_dim"],
        heads=ref["num_heads"],
        prenet_depth=encoder["prenet_depth"],
        depth=ref["depth"],
        mlp_ratio=ref["mlp_ratio"],
        norm_eps=ref["norm_eps"],
        extra_tokens=encoder["num_extra_tokens"],
        num_masks=ref["clone_batch"],
        **{modality: INPUTS[modality](case, encoder)},
        mask=MaskConfig(
            encoder["mask_prob"],
            encoder["mask_prob_adjust"],
            encoder["mask_length"],
            encoder["inverse_mask"],
            encoder["mask_noise_std"],
        ),
        decoder=DecoderConfig(
            decoder["decoder_dim"],
            decoder["decoder_groups"],
            decoder["decoder_kernel"],
            decoder["decoder_layers"],
            decoder["decoder_residual"],
            decoder["projection_layers"],
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
        train=TrainConfig(10**15, case["batch"], None, case["seed"], "fp32", f"ds_configs/zero{zero}.json"),
    )
