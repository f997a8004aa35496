"""Replays one golden case through `pretrain.train.Trainer` and measures how far every quantity is off."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from safetensors.torch import load_file
from torch import Tensor

import pretrain.train
from models.config import ModelConfig
from models.data2vec import Batch, Output
from models.masks import gather_rows
from models.split import split_of
from pretrain.parallel import World
from pretrain.train import Trainer
from tests.parity.reference import our_config, renamed

FORWARD, LOSS, GRADIENT, TRAJECTORY, WEIGHTS = 1e-5, 2e-6, 1e-5, 2e-5, 2e-4
NORMS = (
    1e-4  # of gradients along five steps: the authors' own fp32 run is 3.2e-5 from its float64 twin (audio_base_pad)
)


@dataclass(frozen=True)
class Row:
    """One compared quantity."""

    quantity: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN, too


def cases(folder: Path) -> list[Path]:
    """The case descriptions of a folder: every JSON beside a safetensors file of the same name."""
    return [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".safetensors").exists()]


def replay(path: Path, zero: str, world: World, brief: bool = False) -> list[Row]:
    """All quantities of the case described by `path`, under ds_configs/zero`zero`.json; if `brief`, without those of
    the run that decays all parameters, as the reference's program does."""
    case = json.loads(path.read_text())
    golden = load_file(path.with_suffix(".safetensors"))
    rows: list[Row] = []
    for label, exempt in (("", True), ("_ascode", False))[: 1 if brief else 2]:
        config = our_config(case, float(golden["traj.lr"][0]), zero, exempt)
        config = replace(
            config,
            train=replace(config.train, batch_size=world.data_ranks, micro_batch=1, tensor_parallel=world.tensor_ranks),
        )
        model = config.model
        weights = renamed(golden, "state.", "student", model) | renamed(golden, "teacher.", "teacher", model)
        trainer = Trainer(config, world, weights)
        if exempt:
            rows += first_step_forward(trainer, golden)
        trajectory = []
        gradients: dict[str, Tensor] = {}
        for k in range(len(golden["traj.loss"])):
            with spied(trainer, gradients if k == 0 else None) as seen:
                batch = batch_of(golden, "input." if k == 0 else f"traj.{k}.input.", model)
                sums, result = trainer.step([share(batch, world)])
            sums_of_losses = {name: float(world.sum(getattr(seen[0], name).detach())) for name in ("regression", "cls")}
            trajectory.append((trainer.measure(sums, result), sums_of_losses))
        if exempt:
            rows += first_step_losses(model, *trajectory[0], golden)
            rows += first_step_gradients(gradients, golden, model)
        expected = case["logs"]["traj" + label]
        for quantity, bound in (("loss", TRAJECTORY), ("grad_norm", NORMS)):
            ours = torch.tensor([metrics[quantity] for metrics, _ in trajectory], dtype=torch.float64)
            error = (ours / torch.tensor(expected[quantity], dtype=torch.float64) - 1).abs().max()
            rows.append(Row(f"traj{label}.{quantity}", float(error), bound))
        rows += final_weights(trainer, golden, label)
        trainer.engine.destroy()
    return rows


def batch_of(golden: dict[str, Tensor], prefix: str, model: ModelConfig) -> Batch:
    mask = golden[prefix + "mask"].bool()
    n = len(mask)
    source, seeds = golden[prefix + "source"], (0,) * len(golden[prefix + "source"])  # the cases are without noise
    if model.modality == "text":
        source = source.long()
    padding, lengths = golden.get(prefix + "padding_mask"), None
    if padding is not None and padding.any():
        sizes = (padding == 0).sum(1)
        assert all(
            (row[:size] == 0).all() and (row[size:] == 1).all() for row, size in zip(padding, sizes, strict=True)
        )
        lengths = torch.tensor([model.grid(int(size))[0] for size in sizes])
    return Batch(source, (~mask).nonzero()[:, 1].view(n, -1), mask.nonzero()[:, 1].view(n, -1), seeds, lengths=lengths)


def share(batch: Batch, world: World) -> Batch:
    """This rank's part of a batch: some samples, or of one sample some masks. Parts may differ in size."""
    samples, masks = len(batch.inputs), len(batch.ids_mask) // len(batch.inputs)
    if world.data_ranks <= samples:
        own, views = np.array_split(np.arange(samples), world.data_ranks)[world.data_rank], np.arange(masks)
    else:
        groups = np.array_split(np.arange(world.data_ranks), samples)
        sample, ranks = next((i, group) for i, group in enumerate(groups) if world.data_rank in group)
        own = np.array([sample])
        views = np.array_split(np.arange(masks), len(ranks))[world.data_rank - ranks[0]]
    rows = (own[:, None] * masks + views).ravel()
    lengths = None if batch.lengths is None else batch.lengths[own]
    seeds = tuple(batch.seeds[i] for i in own)
    return Batch(batch.inputs[own], batch.ids_keep[rows], batch.ids_mask[rows], seeds, lengths=lengths)


def first_step_forward(trainer: Trainer, golden: dict[str, Tensor]) -> list[Row]:
    """Features, targets and predictions, part by part, in the modules that the step below runs."""
    model = trainer.model
    batch = batch_of(golden, "input.", model.config).to(trainer.world.device)
    extra = model.config.extra_tokens
    seen: dict[str, Tensor] = {}

    def keep(name: str, pick: Any) -> Any:
        return lambda module, args, output=None: seen.__setitem__(name, pick(args, output))

    hooks = [
        model.student.blocks[0].register_forward_pre_hook(keep("context", lambda a, _: a[0])),
        model.student.blocks[-1].register_forward_hook(keep("encoder", lambda _, o: o[0])),
        model.decoder.register_forward_pre_hook(keep("decoder_input", lambda a, _: a[0])),
        model.decoder.proj.register_forward_hook(keep("pred", lambda _, o: o)),
        model.teacher.blocks[0].register_forward_pre_hook(keep("teacher_input", lambda a, _: a[0])),
    ]
    for i, block in enumerate(model.teacher.blocks):
        hooks.append(block.mlp.register_forward_hook(keep(f"teacher_layer.{i}", lambda _, o: o[:, extra:])))
    with torch.no_grad():
        seen["local_features"] = features = model.student.local(batch.inputs, batch.lengths)
        seen["target"] = model.targets(batch.inputs, features, batch.lengths)
        if model.student.alibi is not None:
            bias = model.student.bias(features, batch.ids_keep, None)
            slope = whole("alibi.scale", bias.slope, trainer.world)
            seen["alibi_bias"] = slope[:, None, None] * bias.distance[:, None]
        model(batch)
    for hook in hooks:
        hook.remove()
    rows = []
    for name, value in seen.items():
        expected = golden[f"out.{name}"]
        if name == "pred":  # ours exist only where the loss looks
            expected = gather_rows(expected, batch.ids_mask.cpu())
        rows.append(Row(f"out.{name}", relative(value, expected), FORWARD))
    return rows


def first_step_losses(
    config: ModelConfig, metrics: dict[str, float], losses: dict[str, float], golden: dict[str, Tensor]
) -> list[Row]:
    size = float(golden["out.sample_size"])
    rows = []
    for name, value in (("target_var", metrics["target_deviation"]), ("pred_var", metrics["prediction_deviation"])):
        rows.append(Row(f"out.{name}", abs(value / float(golden[f"out.{name}"]) - 1), FORWARD))
    cls = losses["cls"] * config.loss.cls * config.loss.cls_rows / len(golden["input.mask"]) * size
    terms = [
        ("loss", metrics["loss"]),
        ("loss_sum", metrics["loss"] * size),
        ("loss_sum.cls", cls),
        (f"loss_sum.{config.modality.upper()}_regression", losses["regression"]),
    ]
    for name, value in terms:
        if f"out.{name}" not in golden:  # a case without the class-token term
            continue
        rows.append(Row(f"out.{name}", abs(value / float(golden[f"out.{name}"]) - 1), LOSS))
    return rows


def first_step_gradients(gradients: dict[str, Tensor], golden: dict[str, Tensor], model: ModelConfig) -> list[Row]:
    expected = renamed(golden, "grad.", "student", model)
    if set(expected) != set(gradients):
        raise AssertionError(f"parameters with a gradient differ: {set(expected) ^ set(gradients)}")
    worst = max(relative(without_key_bias(n, gradients[n]), without_key_bias(n, g)) for n, g in expected.items())
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    return [
        Row("grad (worst tensor)", worst, GRADIENT),
        Row("out.grad_norm", abs(norm / float(golden["out.grad_norm"]) - 1), GRADIENT),
    ]


def final_weights(trainer: Trainer, golden: dict[str, Tensor], label: str) -> list[Row]:
    parameters = dict(trainer.model.named_parameters())
    rows = []
    wanted = [(f"final{label}.", "student")] + ([("final_teacher.", "teacher")] if not label else [])
    for prefix, owner in wanted:
        worst = 0.0
        for name, expected in renamed(golden, prefix, owner, trainer.config.model).items():
            parameter = parameters[name]
            sharded = trainer.engine.zero_optimization() and owner == "student"
            with GatheredParameters([parameter]):
                value = safe_get_full_fp32_param(parameter) if sharded else parameter.detach().clone()
            value = whole(name, value, trainer.world)
            difference = without_key_bias(name, value).cpu() - without_key_bias(name, expected)
            worst = max(worst, float(difference.abs().max()))
        rows.append(Row(prefix + "* (absolute)", worst, WEIGHTS))
    return rows


@contextmanager
def spied(trainer: Trainer, gradients: dict[str, Tensor] | None) -> Iterator[list[Output]]:
    """Watches one `Trainer.step`: its model's output, and the gradients as the optimizer is about to get them."""
    seen: list[Output] = []
    hook = trainer.model.register_forward_hook(lambda module, args, output: seen.append(output))
    original = pretrain.train.optimizer_step

    def spy(engine: Any) -> Any:
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter) if engine.zero_optimization() else parameter.grad
                gradients[name] = whole(name, gradient.clone(), trainer.world)
        return original(engine)

    if gradients is not None:
        pretrain.train.optimizer_step = spy
    try:
        yield seen
    finally:
        pretrain.train.optimizer_step = original
        hook.remove()


def whole(name: str, value: Tensor, world: World) -> Tensor:
    """The parameter of which tensor-parallel ranks have slices."""
    split = split_of(name, world.tensor_rank, world.tensor_ranks)
    if split is None:
        return value
    slices = [torch.empty_like(value) for _ in range(world.tensor_ranks)]
    dist.all_gather(slices, value.contiguous(), group=world.tensor_group)
    return split.join(slices)


def relative(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected| in the Euclidean norm; shapes must agree."""
    if value.shape != expected.shape:
        raise AssertionError(f"shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
    return float((value.double().cpu() - expected.double()).norm() / expected.double().norm())


def without_key_bias(name: str, value: Tensor) -> Tensor:
    """Softmax does not feel a constant added to all logits, so the key bias's gradient is rounding noise alone."""
    if not re.search(r"attn\.qkv\.bias$", name):
        return value
    third = len(value) // 3
    return torch.cat([value[:third], value[2 * third :]])
