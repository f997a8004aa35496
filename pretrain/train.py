"""Pre-training: batch -> engine -> optimizer -> teacher. The loop around a step is `pretrain.loop`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor

from models.config import LossConfig
from models.data2vec import Batch, Output
from models.masks import row_keys
from models.objectives import network
from models.targets import Moments, deviation, pool
from pretrain.checkpoint import CheckpointError, RunState, start_from
from pretrain.config import BatchPlan, Config, batch_plan
from pretrain.data.loader import Dataset, build_dataset, build_loader
from pretrain.eager import shapes_only
from pretrain.ema import ShardedTeacher
from pretrain.engine import StepResult, build_engine, loss_scale, optimizer_step
from pretrain.full import Full, expected_shapes, refuse_differences
from pretrain.loop import Diverged, Evaluation
from pretrain.optim import ema_decay, learning_rate, parameter_groups, set_hyperparameters
from pretrain.parallel import World


@dataclass
class StepSums:
    """Sums over the micro-batches of one step, on the device; nothing waits for them until they are read."""

    loss: Tensor
    prediction: Moments | None = None
    target: Moments | None = None
    samples: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, batch: Any, loss: Tensor, output: Any) -> None:
        self.samples += len(batch.inputs)
        self.failures += batch.failures
        self.loss += loss.detach().float()
        self.watch(output)

    def watch(self, output: Any) -> None:
        """What of an output there are figures of, beside the loss."""
        self.prediction = pool(self.prediction, output.prediction) if self.prediction else output.prediction
        self.target = pool(self.target, output.target) if self.target else output.target


def objective(output: Output, loss: LossConfig, masked: Tensor | int, rows: Tensor | int) -> Tensor:
    """This micro-batch's part of the global loss: parts add up over micro-batches and ranks (docs/method.md 1.6).

    `masked` and `rows` count the *global* batch: its hidden positions, and its samples times masks.
    """
    return output.regression / masked + loss.cls * loss.cls_rows / rows * output.cls


def micro_step_seed(seed: int, batch: int, micro_step: int) -> int:
    """What layer drop is drawn from, the same on all ranks, and, the rank added, dropout: pure in its arguments."""
    key = row_keys(seed, np.array([batch]), np.array([micro_step]), 1)
    return int(key[0] >> np.uint64(2))


class Trainer:
    """Model, engine, teacher and position of one run; `weights` is a state dict of the model to start from."""

    Sums = StepSums

    def __init__(self, config: Config, world: World, weights: dict[str, Tensor] | None = None) -> None:
        self.config, self.world = config, world
        self.plan: BatchPlan = batch_plan(config.train, world.size)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.model = network(config.model)
        groups = parameter_groups(self.model, config.optim)
        self.engine: deepspeed.DeepSpeedEngine = build_engine(self.model, groups, config, self.plan, world)
        self.teacher: Any = self.average()
        self.state = RunState()
        if weights is not None:
            start_from(self.engine, self.teacher, weights)

    def average(self) -> ShardedTeacher | None:
        """What follows the student, if anything does."""
        return ShardedTeacher(self.engine, self.model)

    def part(self, output: Any, masked: Tensor, rows: Tensor) -> Tensor:
        """A micro-batch's part of the global loss: see `objective`."""
        return objective(output, self.config.model.loss, masked, rows)

    def step(self, micro_batches: list[Any]) -> tuple[StepSums, StepResult]:
        """One optimizer step over this rank's share of a global batch, and the teacher's update after it."""
        config, world, state = self.config, self.world, self.state
        counts = sum(b.masked for b in micro_batches), sum(b.rows for b in micro_batches)
        masked, rows = world.sum(torch.stack([torch.full((), n, device=world.device) for n in counts]))
        set_hyperparameters(
            self.engine.optimizer,
            learning_rate(state.step, config.optim, config.train.steps),
            state.step + 1,
            config.optim,
        )
        sums = self.Sums(torch.zeros((), device=world.device))
        for i, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(i + 1 == len(micro_batches))
            seed = micro_step_seed(config.train.seed, state.batches, i)
            torch.manual_seed(seed + world.data_rank)  # dropout's, on every device
            output = self.engine(batch.to(world.device), seed)
            loss = self.part(output, masked, rows)
            # The engine averages over ranks and micro-batches; the parts of the global loss are to be summed.
            self.engine.backward(loss * (world.data_ranks * self.plan.accumulation))
            sums.add(batch, loss, output)
        result = optimizer_step(self.engine)
        state.batches += 1
        state.read += sums.samples
        state.failures += len(sums.failures)
        if result.applied:
            state.step += 1
            if self.teacher:
                self.teacher.update(ema_decay(state.step, config.ema))
        return sums, result

    def measure(self, sums: StepSums, result: StepResult) -> dict[str, float]:
        """The step's figures over the global batch. Collective; this is where the host waits for the device."""
        config, step = self.config, self.state.step
        metrics = {"loss": float(self.world.sum(sums.loss)), "grad_norm": float(result.grad_norm)} | self.figures(sums)
        metrics["lr"] = learning_rate(step - 1, config.optim, config.train.steps)
        if config.train.precision == "fp16":
            metrics["loss_scale"] = loss_scale(self.engine)
        return metrics

    def figures(self, sums: Any) -> dict[str, float]:
        """What data2vec is watched by. Collective."""
        return {
            "target_deviation": float(deviation(self._pooled(sums.target))),
            "prediction_deviation": float(deviation(self._pooled(sums.prediction))),
            "ema_decay": ema_decay(self.state.step, self.config.ema),
        }

    def _pooled(self, own: Moments) -> Moments:
        """Moments over all ranks."""
        if self.world.data_ranks == 1:
            return own
        n = self.world.sum(own.n.clone())
        mean = self.world.sum(own.mean * own.n) / n
        m2 = self.world.sum(own.m2 + own.n * (own.mean - mean) ** 2)
        return Moments(n, mean, m2)


@dataclass
class PreTraining:
    """What `pretrain.loop` runs. Raises ConfigError, DataError or CheckpointError, each with one clear line."""

    config: Config
    world: World

    @property
    def views(self) -> int:
        return self.config.model.num_masks

    def open(self) -> Dataset:
        return build_dataset(self.config, progress=self.world.is_main)

    def build(self, weights: Full | None) -> Trainer:
        return Trainer(self.config, self.world, pretrained(weights, self.config) if weights else None)

    def batches(self, dataset: Dataset, trainer: Trainer) -> Generator[Batch, None, None]:
        return build_loader(dataset, self.config, trainer.plan, self.world, trainer.state.batches)

    def evaluation(self, dataset: Dataset, trainer: Trainer, note: Callable[[str], None]) -> Evaluation | None:
        if not self.config.probe.every:
            return None
        from pretrain.probe import Probe  # scikit-learn takes seconds to import, and only this needs it

        return Probe(self.config, trainer.engine, trainer.plan, self.world, note)

    def assets(self, dataset: Dataset) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in dataset.assets}

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Raises Diverged if targets or predictions have collapsed."""
        watch = self.config.watch
        if step <= watch.after_steps:
            return
        for key, least in (
            ("target_deviation", watch.min_target_deviation),
            ("prediction_deviation", watch.min_prediction_deviation),
        ):
            if metrics[key] < least:
                raise Diverged(f"step {step}: collapse, {key} {metrics[key]:.4g} is under watch.min_{key}={least}.")

    def told(self, metrics: dict[str, float]) -> str:
        return (
            f"ema {metrics['ema_decay']:.6g}  dev target {metrics['target_deviation']:.3f} "
            f"pred {metrics['prediction_deviation']:.3f}  "
        )


def pretrained(weights: Full, config: Config) -> dict[str, Tensor]:
    """A start for the model of `config`. Raises CheckpointError if it is another's."""
    if weights.head is not None:
        raise CheckpointError(f"train.init_from={config.train.init_from} is fine-tuned, and has no teacher and decoder")
    with shapes_only():
        expected = expected_shapes(network(config.model))
    refuse_differences(weights.tensors, expected, f"train.init_from={config.train.init_from}")
    return weights.tensors
