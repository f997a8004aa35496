"""Pre-training by another objective than data2vec's: the same step but for teacher and watches (docs/method.md 5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.baselines.config import DATA2VEC2
from models.objectives import encoder, network
from pretrain import plan
from pretrain.config import Config, batch_plan
from pretrain.eager import shapes_only
from pretrain.engine import engine_config
from pretrain.full import Full
from pretrain.parallel import World
from pretrain.train import PreTraining, StepSums, Trainer, pretrained


@dataclass
class BaselineSums(StepSums):
    """Also of what the objective watches."""

    masked: int = 0  # hidden positions
    watched: dict[str, Tensor] = field(default_factory=dict)

    def add(self, batch: Any, loss: Tensor, output: Any) -> None:
        super().add(batch, loss, output)
        self.masked += batch.masked

    def watch(self, output: Any) -> None:
        for name, value in output.figures.items():
            self.watched[name] = self.watched.get(name, 0) + value


class BaselineTrainer(Trainer):
    """Without a teacher. Figures are means over the hidden positions of the global batch."""

    Sums = BaselineSums

    def average(self) -> None:
        return None

    def part(self, output: Any, masked: Tensor, rows: Tensor) -> Tensor:
        return output.loss / masked

    def step(self, micro_batches: list[Any]) -> Any:
        self.model.step = self.state.step
        return Trainer.step(self, micro_batches)

    def figures(self, sums: Any) -> dict[str, float]:
        masked = self.world.sum(torch.tensor(float(sums.masked), device=self.world.device))
        return {name: float(self.world.sum(value) / masked) for name, value in sums.watched.items()}


@dataclass
class BaselineTraining(PreTraining):
    """What `pretrain.loop` runs."""

    def build(self, weights: Full | None) -> Trainer:
        return BaselineTrainer(self.config, self.world, pretrained(weights, self.config) if weights else None)

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing can collapse that the loss would not tell."""

    def told(self, metrics: dict[str, float]) -> str:
        return "".join(f"{name} {metrics[name]:.3f}  " for name in ("accuracy", "perplexity") if name in metrics)


def start(config: Config, world: World) -> PreTraining:
    return (PreTraining if config.model.objective == DATA2VEC2 else BaselineTraining)(config, world)


def describe(config: Config, ranks: int) -> str:
    """The text of --dry-run; of a baseline, without matrix work and memory."""
    model, train = config.model, config.train
    if model.objective == DATA2VEC2:
        return plan.describe(config, ranks)
    shares = batch_plan(train, ranks)
    engine_config(config, shares)  # refuses what it cannot run
    with shapes_only():
        size, own = (sum(p.numel() for p in make(model).parameters()) / 1e6 for make in (network, encoder))
    batch = plan.samples(model, train.batch_size)
    lines = [
        f"parameters   {size:.2f} M trained (encoder {own:.2f} M), by {model.objective}",
        f"batch        {train.batch_size} = {shares.ranks} ranks x {shares.micro_batch} x {shares.accumulation} "
        f"accumulated; {batch} {model.unit}, {model.mask.prob:g} of {model.positions} positions hidden",
        f"run          {train.steps:,} steps, {train.steps * batch:,} {model.unit}",
        "matrix work  and memory are computed for data2vec alone",
        f"checkpoints  every {config.run.save_every} steps into {config.run.dir}/checkpoints/step_*",
    ]
    return "\n".join(lines)
