"""Parameter groups with rates that fall towards the input, and fine-tuning's schedules."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from finetune.config import FineTuningOptimConfig
from models.heads import FineTuned
from pretrain import optim

FROZEN = ("student.local.convs.", "student.local.norms.")
INITIAL = 0.01  # of the peak (fairseq's default, which wav2vec 2.0's files leave as it is)


def parameter_groups(model: FineTuned, config: FineTuningOptimConfig) -> list[dict[str, Any]]:
    """A group for each rate and whether it is spared the weight decay (docs/method.md 4). With `layer_decay` d, block i
    of n, the prenet's first, counted from 1, has the rate times d ** (n + 1 - i); the head has `head_scale` times the
    rate, a waveform's convolutions none with `freeze_local`, and all else the full one. `head`: whether a group is the
    head's."""
    blocks = model.config.prenet_depth + model.config.depth
    groups: dict[tuple[float, bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = 1.0
        if match := re.match(r"student\.(prenet|blocks)\.(\d+)\.", name):
            number = int(match[2]) + 1 + (model.config.prenet_depth if match[1] == "blocks" else 0)
            scale = config.layer_decay ** (blocks + 1 - number)
        elif name.startswith("head."):
            scale = config.head_scale
        elif config.freeze_local and name.startswith(FROZEN):
            scale = 0.0
        exempt = config.exempt_1d and parameter.ndim <= 1
        groups.setdefault((scale, name.startswith("head."), exempt), []).append(parameter)
    return [
        {"params": params, "weight_decay": 0.0 if exempt else config.weight_decay, "lr_scale": scale, "head": head}
        for (scale, head, exempt), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def learning_rate(step: int, config: FineTuningOptimConfig, steps: int) -> float:
    """The rate of update number `step`, counted from 0, on the full scale: linear warm-up from 0, and then what
    `schedule` says. Tri-stage's begins at a hundredth of the peak instead of 0."""
    if config.schedule == "tri_stage" and step < config.warmup_steps:
        return config.lr * (INITIAL + (1 - INITIAL) * step / config.warmup_steps)
    if config.schedule != "tri_stage":
        return optim.learning_rate(step, config, steps)
    left = steps - config.warmup_steps
    hold = round(config.hold * steps)
    decayed = min(1.0, max(0, step - config.warmup_steps - hold) / max(1, left - hold))
    return config.lr * math.exp(math.log(config.final_scale) * decayed)
