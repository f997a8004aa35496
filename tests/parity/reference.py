"""A golden case's parameters and configuration in our words, which `convert` has."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from convert.authors import EMA, expected_names
from convert.keymaps import ALIBI, encoder_of, our_settings
from models.config import RATE, ModelConfig
from models.text import FIRST_POSITION
from pretrain.config import Config, EmaConfig, OptimConfig, TrainConfig
from pretrain.full import model_of
from pretrain.settings import build, to_tree


def renamed(tensors: dict[str, Tensor], prefix: str, owner: str, model: ModelConfig) -> dict[str, Tensor]:
    """The tensors below `prefix`, under our names. Raises KeyError for one that the model has not."""
    names, out = names_of(model), {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            name, _ = names[key.replace(prefix, f"{EMA}." if owner == "teacher" else "", 1)]
            if name:  # else it is computed here
                out[name] = value.flatten() if key.endswith(ALIBI) else value
    return out


@cache
def names_of(model: ModelConfig) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """The reference's names: it takes a network to know them."""
    return expected_names({"model": to_tree(model)})


def our_config(case: dict[str, Any], lr: float, zero: str, exempt_1d: bool) -> Config:
    """The configuration of a case, from the complete resolved one of the reference."""
    modality = case["modality"].lower()
    settings = our_settings(case["config"], modality)
    model = model_of(settings)
    optimizer = case["optimizer_groups_as_code_builds_them"][0]
    if modality == "image":
        model = replace(model, loss=replace(model.loss, cls_rows=case["batch"] * case["clone_batch"]))
    elif modality == "audio":
        model = replace(model, audio=replace(model.audio, seconds=case["shapes"]["input.source"][1] / RATE))
    else:
        tables = [case["shapes"][f"state.{encoder_of(modality)}.local_encoder.embed_{t}.weight"] for t in TABLES]
        model = replace(model, text=replace(model.text, vocabulary=tables[0][0], tokens=tables[1][0] - FIRST_POSITION))
    optim = OptimConfig(
        lr=lr,
        betas=tuple(optimizer["betas"]),
        eps=optimizer["eps"],
        weight_decay=optimizer["wd"],
        exempt_1d=exempt_1d,
        clip_norm=case["clip_norm"] or 0.0,
        warmup_steps=0,
    )
    # A cosine this long is constant, as the cases' learning rate is.
    train = TrainConfig(10**15, case["batch"], None, case["seed"], "fp32", f"ds_configs/zero{zero}.json")
    return Config(model=model, optim=optim, ema=build(EmaConfig, settings["ema"], "ema."), train=train)


TABLES = ("tokens", "positions")
