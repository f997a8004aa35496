"""Run by test_teacher.py under one or more ranks: every ZeRO stage and precision in turn, one JSON line each."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from models.data2vec import Batch
from pretrain import parallel
from pretrain.config import PRECISIONS, load
from pretrain.data.loader import build_dataset, build_loader
from pretrain.engine import loss_scale
from pretrain.optim import ema_decay
from pretrain.train import Trainer

STEPS = 4
OFFLOADED = ("1_offload", "3_offload", "2_offload")  # one for each precision
FUSED = (("0", "fp16"), ("1", "bf16"), ("3", "bf16"))  # these by the kernel, too, through Triton's interpreter


def full_student(trainer: Trainer) -> dict[str, Tensor]:
    """The student's fp32 weights, gathered parameter by parameter, by other means than the teacher uses."""
    out = {}
    optimizer = trainer.engine.optimizer
    masters = {}
    if hasattr(optimizer, "fp32_groups"):
        for low, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= {id(p): m for p, m in zip(low, full, strict=True)}
    for name, parameter in trainer.model.student.named_parameters():
        if trainer.engine.zero_optimization():
            value = safe_get_full_fp32_param(parameter)
        else:
            value = masters.get(id(parameter), parameter)
        out[name] = value.detach().float().clone()
    return out


def full_teacher(trainer: Trainer) -> dict[str, Tensor]:
    """What the forward pass reads, in fp32."""
    parameters = dict(trainer.model.teacher.named_parameters())
    with GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def frozen(trainer: Trainer) -> list[Tensor]:
    """Copies of everything that a skipped step must not touch."""
    state = [t for t in trainer.engine.optimizer.state.values() for t in t.values() if torch.is_tensor(t)]
    parameters = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters()]  # stage 3: this rank's partitions
    tensors = [*parameters, *trainer.teacher.averages, *trainer.teacher.masters, *state]
    return [t.detach().clone() for t in tensors]


def poisoned(batch: Batch) -> Batch:
    pixels = batch.inputs.float()
    pixels[0, 0, 0, 0] = float("nan")
    return replace(batch, inputs=pixels)


def scenario(zero: str, precision: str, world: parallel.World, kernel: str = "torch") -> dict[str, Any]:
    overrides = [f"train.precision={precision}", f"train.deepspeed=ds_configs/zero{zero}.json"]
    overrides += [f"train.micro_batch={4 // world.size}", f"train.kernels.teacher={kernel}"]
    config = load("tests/tiny.yaml", overrides)
    trainer = Trainer(config, world)
    batches = build_loader(build_dataset(config), config, trainer.plan, world, 0)
    expected = full_teacher(trainer)
    starts_equal = all(torch.equal(expected[n], v) for n, v in full_student(trainer).items())

    def micro_batches() -> list[Batch]:
        return [next(batches) for _ in range(trainer.plan.accumulation)]

    skipped = 0
    while trainer.state.step < STEPS:
        _, result = trainer.step(micro_batches())
        skipped += not result.applied
        if result.applied:
            decay = ema_decay(trainer.state.step, config.ema)
            for name, value in full_student(trainer).items():
                expected[name].mul_(decay).add_(value, alpha=1 - decay)

    published = 0.0
    for name, value in full_teacher(trainer).items():  # as the next forward pass finds it
        difference = (value - expected[name]).abs() / expected[name].abs().clamp(min=1e-3)
        published = max(published, float(difference.max()))

    before, step, scale = frozen(trainer), trainer.state.step, loss_scale(trainer.engine)
    bad = micro_batches()
    if world.is_main:  # one bad value on one rank is enough
        bad[-1] = poisoned(bad[-1])
    _, result = trainer.step(bad)
    untouched = all(torch.equal(a, b) for a, b in zip(before, frozen(trainer), strict=True))

    owned = torch.zeros((), dtype=torch.int64)
    error = 0.0
    for piece in trainer.teacher.pieces:
        name = piece.name.removeprefix("teacher/")
        part = expected[name].view(-1)[piece.start : piece.start + piece.values.numel()]
        error = max(error, float((piece.values - part).abs().max()))
        owned += piece.values.numel()
    with CommDebugMode() as communicated:
        trainer.teacher.update(0.5)
    student = full_student(trainer)
    moved = max(float((v - student[n]).abs().max()) for n, v in expected.items())
    return {
        "zero": zero, "precision": precision, "rank": world.rank, "starts_equal": starts_equal, "error": error,
        "published": published, "moved": moved, "owned": int(owned), "skipped": skipped,
        "total": sum(value.numel() for value in expected.values()),
        "communicated": communicated.get_total_counts(),
        "bad_applied": result.applied, "bad_untouched": untouched, "bad_step": trainer.state.step - step,
        "scale_ratio": loss_scale(trainer.engine) / scale, "dtype": str(next(trainer.model.teacher.parameters()).dtype),
    }  # fmt: skip


if __name__ == "__main__":
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    get_accelerator().is_fp16_supported = lambda: True  # torch computes in fp16 on CPU; DeepSpeed only doubts it
    world = parallel.start()
    lines = []
    for zero, precision in [*product("0123", PRECISIONS), *zip(OFFLOADED, PRECISIONS, strict=True)]:
        lines.append(json.dumps(scenario(zero, precision, world)))
    lines += [json.dumps(scenario(zero, precision, world, "triton")) for zero, precision in FUSED]
    (Path(sys.argv[1]) / f"rank{world.rank}.jsonl").write_text("\n".join(lines))
    parallel.stop()
