"""Twins, on the CPU and of plain arithmetic, of what only a GPU has: apex's and DeepSpeed's Adam, apex's LayerNorm."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


@torch.no_grad()
def adam_kernel(
    chunk: int,
    flag: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    corrected: int,
    decay: float,
) -> None:
    """Takes what both packages hand theirs. Gradients that are not finite go through."""
    assert type(step) is int and step > 0 and decoupled == corrected == 1
    for g, p, m, v in zip(*lists, strict=True):
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        p.copy_(p - lr * (m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * p))


class ApexAdam(torch.optim.Optimizer):
    """Counts steps by group and by call, fails at a group of nothing, and lays out what it goes over at the first."""

    def __init__(
        self, params: Any, lr: float, bias_correction: bool, betas: Any, eps: float, adam_w_mode: bool, **more: Any
    ) -> None:
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(params, defaults | more)
        self.adam_w_mode, self.slots = int(adam_w_mode), None
        self.flag = torch.zeros(1, dtype=torch.int32)

    def step(self, closure: Any = None) -> None:
        self.slots = self.slots or [len(group["params"]) for group in self.param_groups]
        for group, slots in zip(self.param_groups, self.slots, strict=False):
            assert group["params"][0].device.type == "cpu"
            group["step"] = group.get("step", 0) + 1
            lists: list[list[Tensor]] = [[], [], [], []]
            for p in group["params"][:slots]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                for tensors, tensor in zip(lists, (p.grad, p, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                    tensors.append(tensor)
            betas, of_group = group["betas"], (group["eps"], group["step"], self.adam_w_mode)
            corrected, decay = int(group["bias_correction"]), group["weight_decay"]
            adam_kernel(0, self.flag, lists, group["lr"], *betas, *of_group, corrected, decay)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, shape: Any, eps: float = 1e-6) -> Tensor:
    """In fp32 within; under autocast it casts what it is given to the low precision, as apex's does."""
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight, bias))
    assert x.dtype == weight.dtype and tuple(shape) == x.shape[-1:]
    centred = x.float() - x.float().mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float() + bias.float()
    return y.to(x.dtype)


class Builder:
    """DeepSpeed's, which compiles."""

    def load(self) -> Any:
        return SimpleNamespace(multi_tensor_adam=adam_kernel)


def install(patch: pytest.MonkeyPatch) -> None:
    """apex in full; of DeepSpeed's Adam the kernel alone."""
    from deepspeed.ops.adam import fused_adam

    contents: dict[str, dict[str, Any]] = {
        "apex": {},
        "apex.optimizers": {"FusedAdam": ApexAdam},
        "apex.normalization": {},
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": layer_norm},
        "amp_C": {},
        "fused_layer_norm_cuda": {},
    }
    for name, entries in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(entries)
        patch.setitem(sys.modules, name, module)
    patch.setattr(fused_adam, "FusedAdamBuilder", Builder)
