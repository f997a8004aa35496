"""Fine-tuning: batch -> augmentation -> engine -> optimizer. The loop around a step is `pretrain.loop`."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finetune.config import Config
from finetune.evaluate import Evaluations
from finetune.optim import learning_rate, parameter_groups
from finetune.task import Examples, Task
from models.heads import FineTuned
from pretrain.checkpoint import CheckpointError, RunState, start_from
from pretrain.config import batch_plan
from pretrain.data.loader import load_batches, on_device
from pretrain.eager import shapes_only
from pretrain.engine import StepResult, build_engine, loss_scale, optimizer_step
from pretrain.full import LABELS, Full, expected_shapes, refuse_differences
from pretrain.optim import set_hyperparameters
from pretrain.parallel import World
from pretrain.train import micro_step_seed


@dataclass
class Sums:
    """Over the micro-batches of one step, on the device."""

    loss: Tensor
    samples: int = 0
    failures: list[str] = field(default_factory=list)


class Trainer:
    """Network, engine and position of one run; `weights` is a state dict of the network to start from."""

    teacher = None

    def __init__(self, config: Config, world: World, task: Task, weights: dict[str, Tensor] | None = None) -> None:
        self.config, self.world, self.task = config, world, task
        self.plan = batch_plan(config.train, world.size)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.model = FineTuned(config.model, config.head)
        if weights is not None:
            weights = self.model.state_dict() | weights  # the head as it is drawn
        groups = parameter_groups(self.model, config.optim)
        self.engine: Any = build_engine(self.model, groups, config, self.plan, world)
        self.state = RunState()
        if weights is not None:
            start_from(self.engine, None, weights)

    def step(self, micro_batches: list[Examples]) -> tuple[Sums, StepResult]:
        """One optimizer step over this rank's share of a global batch."""
        config, world, state = self.config, self.world, self.state
        count = world.sum(torch.full((), sum(b.count for b in micro_batches), device=world.device))
        rate = learning_rate(state.step, config.optim, config.train.steps)
        set_hyperparameters(self.engine.optimizer, rate, state.step + 1, config.optim)
        frozen = state.step < config.optim.freeze_steps
        for group in self.engine.optimizer.param_groups:
            if frozen and not group["head"]:
                group["lr"] = 0.0  # nor does decay move it
        sums = Sums(torch.zeros((), device=world.device))
        for i, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(i + 1 == len(micro_batches))
            # Of dropout and augmentation, on every device.
            seed = micro_step_seed(config.train.seed, state.batches, i)
            torch.manual_seed(seed + world.data_rank)
            examples = self.task.augment(batch.to(world.device))
            outputs = self.engine(
                examples.inputs,
                examples.lengths,
                frozen=frozen,
                frozen_local=config.optim.freeze_local,
                seed=seed,
                **self.task.arguments(examples),
            )
            loss = self.task.loss(outputs, examples) / count.clamp(min=1)
            # The engine averages over ranks and micro-batches; the parts of the global loss are to be summed.
            self.engine.backward(loss * (world.data_ranks * self.plan.accumulation))
            sums.loss += loss.detach()
            sums.samples += len(batch.inputs)
            sums.failures += batch.failures
        result = optimizer_step(self.engine)
        state.batches += 1
        state.read += sums.samples
        state.failures += len(sums.failures)
        state.step += result.applied
        return sums, result

    def measure(self, sums: Sums, result: StepResult) -> dict[str, float]:
        """The step's figures over the global batch. Collective; this is where the host waits for the device."""
        metrics = {
            "loss": float(self.world.sum(sums.loss)),
            "grad_norm": float(result.grad_norm),
            "lr": learning_rate(self.state.step - 1, self.config.optim, self.config.train.steps),
        }
        if self.config.train.precision == "fp16":
            metrics["loss_scale"] = loss_scale(self.engine)
        return metrics


@dataclass
class FineTuning:
    """What `pretrain.loop` runs. Raises ConfigError, DataError or CheckpointError, each with one clear line."""

    task: Task
    world: World
    views = 1

    @property
    def config(self) -> Config:
        return self.task.resolved

    def open(self) -> Any:
        return self.task.train.dataset

    def build(self, weights: Full | None) -> Trainer:
        config = self.config
        return Trainer(
            config, self.world, self.task, start_weights(weights, config, self.task.labels) if weights else None
        )

    def batches(self, dataset: Any, trainer: Trainer) -> Generator[Examples, None, None]:
        task = self.task
        keys = task.sampler(trainer.plan, self.world.data_rank, trainer.state.batches)
        collate = partial(task.collate, task.train.references)
        batches = load_batches(dataset, keys, collate, self.config.data.workers, self.world)
        return on_device(batches, self.world.device)

    def evaluation(self, dataset: Any, trainer: Trainer, note: Callable[[str], None]) -> Evaluations:
        return Evaluations(self.task, trainer.engine, self.world, self.config.train.steps, note)

    def assets(self, dataset: Any) -> dict[str, bytes]:
        labels = json.dumps(self.task.labels, ensure_ascii=False, indent=1) + "\n"
        return self.task.assets | {LABELS: labels.encode()}

    def check(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def told(self, metrics: dict[str, float]) -> str:
        return ""


def start_weights(weights: Full, config: Config, labels: list[str]) -> dict[str, Tensor]:
    """A start for the network of `config` but for its head: one of the encoders of a pre-trained model, or all of a
    fine-tuned one whose outputs have the same names. Raises CheckpointError if it is another's."""
    with shapes_only():
        expected = expected_shapes(FineTuned(config.model, config.head))
    where = f"train.init_from={config.train.init_from}"
    found = {f"student.{name}": tensor for name, tensor in weights.encoder(config.which).items()}
    if weights.head is not None and weights.labels == labels:
        found |= {name: tensor for name, tensor in weights.tensors.items() if name.startswith("head.")}
    else:
        expected = {name: shape for name, shape in expected.items() if not name.startswith("head.")}
    try:
        refuse_differences(found, expected, where)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; which={config.which}") from None
    return found
