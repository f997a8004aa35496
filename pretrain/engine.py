"""The one place that calls `deepspeed.initialize`, and one optimizer step whatever the ZeRO stage and precision."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn

from models.baselines.config import DATA2VEC2
from models.data2vec import Encoder
from models.encoder import Block
from models.fused import kernels
from pretrain.config import BatchPlan, Settings
from pretrain.eager import allow, uncompiled
from pretrain.optim import FUSED, build_optimizer
from pretrain.parallel import ParallelState, World
from pretrain.settings import ConfigError

allow(PartitionedParameterCoordinator)  # of ZeRO 3, at which nothing is compiled (`engine_config`)
# One owner a number: these live in the YAML, so a DeepSpeed JSON that sets them is refused.
OWNED_BY_YAML = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
}
STAGES = (0, 1, 2, 3)
# Of DeepSpeed's section zero_optimization: what changes speed and memory, and neither results nor, as ZeRO++ does,
# which copy of the weights a forward pass reads.
KEYS = (
    *("stage", "offload_optimizer", "overlap_comm", "contiguous_gradients", "reduce_scatter", "round_robin_gradients"),
    *("reduce_bucket_size", "allgather_bucket_size", "allgather_partitions", "sub_group_size"),
    *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
)


class StepResult(NamedTuple):
    applied: bool  # False: the gradient was not finite and nothing moved, as far as the host knows without waiting
    grad_norm: Tensor  # (), global, before clipping


def read_mechanics(path: str) -> dict[str, Any]:
    """A DeepSpeed JSON, from the working directory or else beside the package; ConfigError if it cannot be used."""
    file = Path(path)
    if not file.exists():
        file = Path(__file__).parent.parent / path
    try:
        mechanics = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(
            f"train.deepspeed={path}: {error.strerror}; ds_configs/ has zero0.json to zero3.json"
        ) from None
    except ValueError as error:  # not JSON, or not even text
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    zero = mechanics.get("zero_optimization", {}) if isinstance(mechanics, dict) else None
    if not isinstance(zero, dict):
        raise ConfigError(f"{path} should be a mapping with a section zero_optimization, as ds_configs/zero1.json is")
    for key, owner in OWNED_BY_YAML.items():
        if key in mechanics:
            raise ConfigError(f"{path} sets {key}, which {owner} of the YAML owns; remove it there")
    stage = zero.get("stage", 0)
    if stage not in STAGES:
        raise ConfigError(f"{path}: ZeRO stage {stage} is not supported; know {', '.join(map(str, STAGES))}")
    if others := [key for key in zero if key not in KEYS]:
        raise ConfigError(f"{path}: {', '.join(others)} of zero_optimization is not supported; know {', '.join(KEYS)}")
    offload = zero.get("offload_optimizer") or {}
    if not isinstance(offload, dict):
        raise ConfigError(f'{path}: offload_optimizer of zero_optimization should be a mapping, as {{"device": "cpu"}}')
    device, known = offload.get("device", "none"), ("none", "cpu") if stage else ("none",)
    if device not in known:
        raise ConfigError(
            f"{path}: offload_optimizer to {device!r} at ZeRO stage {stage} is not supported; know {', '.join(known)}"
        )
    if device == "none":
        zero.pop("offload_optimizer", None)
    return mechanics


def engine_config(config: Settings, plan: BatchPlan) -> dict[str, Any]:
    """The complete DeepSpeed config: the mechanics of the JSON and the numbers of the YAML."""
    mechanics = read_mechanics(config.train.deepspeed)
    stage = mechanics.get("zero_optimization", {}).get("stage", 0)
    precision, offload = config.train.precision, "offload_optimizer" in mechanics.get("zero_optimization", {})
    ours: dict[str, Any] = {
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optim.clip_norm if deepspeed_clips(precision == "fp16", stage, offload) else 0.0,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-step
    }
    if offload and config.model.dropout.layer:
        # DeepSpeed moves gradients to the host where they arise: of a block that is left out the old one stays there.
        raise ConfigError(
            f"{config.train.deepspeed} offloads the optimizer, which model.dropout.layer={config.model.dropout.layer} "
            "cannot have; set one without offload, or model.dropout.layer=0"
        )
    if config.train.kernels.adam in FUSED:
        asked = f"train.kernels.adam={config.train.kernels.adam}"
        if offload:
            raise ConfigError(f"{asked} runs on GPUs, and {config.train.deepspeed} offloads the optimizer; take auto")
        if precision == "fp16" and stage == 0:  # DeepSpeed has another wrapper for them, which lays masters out flat
            raise ConfigError(f"{asked} in fp16 needs ZeRO 1, 2 or 3; set train.deepspeed=ds_configs/zero1.json")
    if config.train.compile and stage == 3:
        # Its hooks, a few for every module, are compiled anew for each until torch gives up.
        raise ConfigError("train.compile needs ZeRO 0, 1 or 2; set train.deepspeed=ds_configs/zero1.json")
    if stage == 3 and config.model.objective != DATA2VEC2:
        raise ConfigError(
            f"{config.train.deepspeed} is ZeRO 3, at which the layers of model.objective={config.model.objective} are "
            "not gathered; set train.deepspeed=ds_configs/zero2.json"
        )
    if precision != "fp32" and stage == 0 and config.train.tensor_parallel > 1:
        # DeepSpeed's fp16 wrapper of stage 0 adds up norms as if no layer were split, and megatron-core's layers know
        # autocast on GPUs alone.
        raise ConfigError(
            f"train.precision={precision} with train.tensor_parallel={config.train.tensor_parallel} needs ZeRO 1, 2 or "
            "3; set train.deepspeed=ds_configs/zero1.json"
        )
    if precision == "bf16" and stage == 0:
        # DeepSpeed's bf16 wrapper of stage 0 keeps masters that nothing links to the parameters, and drifts. fp32
        # weights under autocast are what one means by bf16 there.
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif precision == "bf16":
        ours["bf16"] = {"enabled": True, "check_grad_overflow": stage == 3 or offload}
    elif precision == "fp16":
        ours["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1}
    return mechanics | ours


def build_engine(
    model: nn.Module, groups: list[dict[str, Any]], config: Settings, plan: BatchPlan, world: World
) -> deepspeed.DeepSpeedEngine:
    """Puts a model, or this rank's slices of its blocks, on its device under an engine that optimises the parameter
    `groups`. Raises ConfigError if the device cannot run the kernels that are asked for."""
    if found := kernels.problems(config.train.kernels, world.device):
        raise ConfigError("; ".join(f"train.{sentence}" for sentence in found))
    kernels.use(config.train.kernels)
    for module in model.modules():
        if isinstance(module, Encoder):
            module.recompute = config.train.recompute
        elif isinstance(module, Block) and config.train.compile:
            module.compile()
    if world.tensor_group is not None:
        from models.tp_layers import split_blocks  # megatron-core takes seconds to import, and only this needs it

        split_blocks(model, world.tensor_group)
    settings, model = engine_config(config, plan), model.to(world.device)
    optimizer = build_optimizer(groups, config.optim, config.train.kernels.adam)
    if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))  # as the Adam that it is; of others DeepSpeed warns
    with uncompiled():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=settings,
            mpu=ParallelState(world) if world.tensor_ranks > 1 else None,
            dist_init_required=False,
        )
    if world.data_ranks == 1 and not engine.zero_optimization() and not engine.fp16_enabled():
        engine.enable_backward_allreduce = False  # which copies all gradients twice also where nobody else has any
    if engine.fp16_enabled() and not engine.zero_optimization():
        engine.basic_optimizer.state.clear()  # this wrapper has allocated it by a step, which would count as t = 1
    if engine.zero_optimization() and not leaves_clipping(engine):
        # Asked for between the gradients' reduction and the step. DeepSpeed's own makes doubles of all gradients, and
        # waits for the device once a group.
        engine.optimizer.scaled_global_norm = lambda norm_type=2: expect_norm(engine)
    return engine


def deepspeed_clips(fp16: bool, stage: int, offload: bool) -> bool:
    """Whether DeepSpeed's optimizer clips and looks for what is not finite; else `pretrain.optim` does."""
    return fp16 or stage == 3 or offload


def leaves_clipping(engine: deepspeed.DeepSpeedEngine) -> bool:
    return deepspeed_clips(engine.fp16_enabled(), engine.zero_optimization_stage(), engine.zero_cpu_offload())


def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> StepResult:
    """Clips and steps after the last backward of a step. A non-finite gradient moves no weights.

    The host waits for a GPU in fp16, whose scale it has to know, at stage 3, with offload or overlap_comm, in fp32 at
    stages 1 and 2, and for the FusedAdam of apex or DeepSpeed; nowhere else.
    """
    if leaves_clipping(engine):
        engine.step()
        if engine.zero_optimization_stage() == 3:
            # It keeps the gradient of a block that layer drop leaves out of the next step, and would apply it again.
            engine.optimizer.grad_partitions_flat_buffer.zero_()
        norm = engine.get_global_grad_norm()
        return StepResult(engine.was_step_applied(), torch.as_tensor(math.inf if norm is None else norm))
    if engine.zero_optimization():
        engine.step()
        norm = torch.as_tensor(engine.get_global_grad_norm())
        return StepResult(engine.was_step_applied() and not known_infinite(norm) and stepped(engine), norm)
    for parameter in engine.module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            # Of a block that layer drop has left out. DeepSpeed's reduction does so, which one rank goes without.
            parameter.grad = torch.zeros_like(parameter)
    norm = expect_norm(engine)
    if known_infinite(norm):
        engine.zero_grad()
        return StepResult(False, norm)
    engine.step()
    return StepResult(stepped(engine), norm)


def stepped(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether the optimizer has moved anything, as far as it was told on the host."""
    return getattr(engine.basic_optimizer, "finite", None) is not False


def known_infinite(norm: Tensor) -> bool:
    """Whether it is not finite, on the host; a GPU is not waited for."""
    return norm.device.type == "cpu" and not norm.isfinite()


def expect_norm(engine: deepspeed.DeepSpeedEngine) -> Tensor:
    """Tells the optimizer the global norm of the gradients, and returns it: ()."""
    norm = gradient_norm(engine)
    engine.basic_optimizer.expect(norm)
    return norm


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> Tensor:
    """Of the gradients that this rank has, whole or its partition, and, over the ranks that share layers, of those it
    has slices of: () fp32."""
    whole: list[Tensor] = []
    slices: list[Tensor] = []
    for parameter, gradient in gradients(engine):
        (slices if getattr(parameter, "tensor_model_parallel", False) else whole).append(gradient)
    squares = torch.stack([squared_norm(whole, engine.device), squared_norm(slices, engine.device)])
    if engine.zero_optimization():
        dist.all_reduce(squares, group=engine.optimizer.dp_process_group)
    of_whole, of_slices = squares
    if engine.mpu is not None:
        of_slices = engine.mpu.world.sum_slices(of_slices.clone())
    return (of_whole + of_slices).sqrt()


def gradients(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, gradient), reduced and ready for the step; at stages 1 and 2 what of them this rank steps with."""
    if not engine.zero_optimization():
        yield from ((p, p.grad) for p in engine.module.parameters() if p.grad is not None)
        return
    zero = engine.optimizer
    for index, partition in zero.averaged_gradients.items():
        real = [g for g in partition if not getattr(g, "_zero_padding", False)]
        yield from zip(zero.params_in_partition[index], real, strict=False)  # a rank may have padding alone


def squared_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """() fp32, also of none."""
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).square().sum()


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float:
    """The dynamic loss scale of fp16; 1 otherwise."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
