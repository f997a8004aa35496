"""Parameter groups, and schedules as pure functions of the step."""

from __future__ import annotations

import math
from functools import cache
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor

from models.fused.kernels import reason
from pretrain.config import EmaConfig, OptimConfig
from pretrain.settings import ConfigError


def parameter_groups(model: Any, config: OptimConfig) -> list[dict[str, Any]]:
    """Up to four groups of a `models.objectives.network`: {averaged by the teacher, not} x {decayed, exempt}.

    A ZeRO optimizer lays each group out as one flat buffer. Keeping what the teacher averages in groups of its own lets
    `pretrain.ema` mirror whole buffers instead of picking parameters out of them.
    """
    tracked = {id(student) for student, _ in model.tracked()}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            exempt = config.exempt_1d and parameter.ndim <= 1
            groups.setdefault((id(parameter) in tracked, exempt), []).append(parameter)
    return [
        {"params": params, "weight_decay": 0.0 if exempt else config.weight_decay, "tracked": is_tracked}
        for (is_tracked, exempt), params in sorted(groups.items(), reverse=True)
    ]


class ClippingAdamW(torch.optim.AdamW):
    """AdamW whose fused kernel clips what it reads to the norm `most` (0: not), and moves nothing if the norm is not
    finite: the host is not asked, and gradients are not passed over once more."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    # torch's import its compiler, to be left alone by it (`pretrain.eager`).
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    add_param_group = unwrap(torch.optim.AdamW.add_param_group)

    def __init__(self, groups: list[dict[str, Any]], most: float, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self.most = most

    def expect(self, norm: Tensor) -> None:
        """The gradients of the next step have the global `norm` ()."""
        self.found_inf = (~norm.isfinite()).float()
        self.grad_scale = ((norm.float() + 1e-6) / self.most).clamp(min=1) if self.most else None


FUSED = ("apex", "deepspeed")  # kernels of a FusedAdam


class ClippingFirst(torch.optim.Optimizer):
    """Goes before apex's or DeepSpeed's FusedAdam, whose kernel neither clips nor skips. Gradients are gone over once
    more, on the device, and the host waits for it, once an update, to know whether anything is to move. Not run on
    hardware.

    Of steps taken `set_hyperparameters` keeps count: theirs goes up with each call, of which ZeRO makes one a group.
    """

    norm: Tensor | None = None
    finite: bool | None = None  # None: the host has not asked yet

    def __init__(self, groups: list[dict[str, Any]], most: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.most = most

    def expect(self, norm: Tensor) -> None:
        """The gradients of the next step have the global `norm` ()."""
        self.norm, self.finite = norm, None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        filled = [group for group in groups if group["params"]]  # at stage 3 the others are empty, which apex fails at
        if self.norm is not None:
            if self.finite is None:
                self.finite = bool(self.norm.isfinite())
            if not self.finite:
                return
            gradients = [p.grad for group in filled for p in group["params"] if p.grad is not None]
            if self.most and gradients:
                torch._foreach_mul_(gradients, (self.most / (self.norm.float() + 1e-6)).clamp(max=1))
        counts = [group.setdefault("step", 0) for group in filled]
        for group in filled:
            for state in (self.state[p] for p in group["params"]):
                if state:  # an empty one they have yet to fill
                    state["step"] = group["step"]  # where DeepSpeed's counts
        self.param_groups = filled
        super().step(closure)
        self.param_groups = groups
        for group, count in zip(filled, counts, strict=True):
            group["step"] = count


def fused_adam(adam: str) -> Any:
    """The class."""
    if adam == "apex":
        from apex.optimizers import FusedAdam
    else:
        from deepspeed.ops.adam import FusedAdam
    return FusedAdam


@cache
def clipping_first(fused: type) -> Any:
    """A FusedAdam with `ClippingFirst` before it: one class, for DeepSpeed compares types."""
    return type(f"Clipping{fused.__name__}", (ClippingFirst, fused), {})


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, adam: str = "auto"
) -> ClippingAdamW | ClippingFirst:
    """`adam` of `models.fused.kernels`. Its rate is 0 until `set_hyperparameters`: some engines step once at start to
    allocate state. Raises ConfigError if a FusedAdam cannot be loaded."""
    settings: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    if adam not in FUSED:
        return ClippingAdamW(groups, config.clip_norm, **settings)
    try:
        kind = clipping_first(fused_adam(adam))
        return kind(groups, config.clip_norm, adam_w_mode=True, bias_correction=True, **settings)
    except Exception as error:  # whatever a compiler, a driver or a loader says
        raise ConfigError(f"train.kernels.adam={adam} cannot be loaded ({reason(error)}); take auto") from error


def learning_rate(step: int, config: OptimConfig, steps: int) -> float:
    """The rate of update number `step`, counted from 0: linear warm-up from 0, then half a cosine, or a line, to 0 at
    `steps`."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    left = max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (steps - step) / left
    progress = (step - config.warmup_steps) / left
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay(update: int, config: EmaConfig) -> float:
    """The decay of the teacher update that follows optimizer step `update`, counted from 1."""
    if update >= config.anneal_steps:
        return config.end
    return config.start + (config.end - config.start) * update / config.anneal_steps


def set_hyperparameters(optimizer: Any, lr: float, update: int, config: OptimConfig) -> None:
    """Readies the groups, each with its `lr_scale` if it has one, for optimizer step `update`, counted from 1.

    The authors add eps to sqrt(v) *before* v's bias is corrected (docs/method.md 1.7). That is AdamW with
    eps / sqrt(1 - b2^t), so any fused AdamW computes it once eps is set anew before each step. `step`, how many were
    taken before, is for `ClippingFirst`: torch's counts itself.
    """
    eps = config.eps / math.sqrt(1 - config.betas[1] ** update)
    for group in optimizer.param_groups:
        group["lr"], group["eps"], group["step"] = lr * group.get("lr_scale", 1.0), eps, update - 1
