"""Evaluations during and after fine-tuning, shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from finetune.config import EvalConfig
from finetune.task import Split, Task
from pretrain.data.loader import load_batches
from pretrain.data.names import few
from pretrain.full import Full
from pretrain.labelled.samples import like_sized
from pretrain.parallel import World
from pretrain.progress import Progress


class Evaluations:
    """What `pretrain.loop` asks for: figures of every split, named SPLIT/FIGURE, and unread_SPLIT, how many of its
    samples could not be read; the same on all ranks. `note` is told which, on the main rank, in a line a split."""

    def __init__(self, task: Task, engine: Any, world: World, steps: int, note: Callable[[str], None]) -> None:
        self.task, self.engine, self.world, self.steps, self.note = task, engine, world, steps, note
        self.config: EvalConfig = task.config.eval

    def due(self, step: int) -> bool:
        return step == self.steps or (self.config.every > 0 and step % self.config.every == 0)

    def __call__(self, step: int) -> dict[str, float]:
        self.engine.eval()
        found: dict[str, float] = {}
        for name, split in self.task.evaluated.items():
            predicted = self.predictions(name, split)
            figures = self.task.score(name, predicted)
            found |= {f"{name}/{figure}": value for figure, value in figures.items()}
            if unread := sum(prediction is None for prediction in predicted):
                found[f"unread_{name}"] = float(unread)
        self.engine.train()
        return found

    def score(self, found: dict[str, float]) -> float:
        first = self.config.splits[0]
        own = {name.removeprefix(f"{first}/"): v for name, v in found.items() if name.startswith(f"{first}/")}
        return self.task.best(own)

    @torch.no_grad()
    def predictions(self, name: str, split: Split) -> list[Any]:
        """For every sample of a split, in its order; on all ranks."""
        task, world = self.task, self.world
        size = max(1, self.config.batch_size // world.data_ranks)
        batches = [batch.tolist() for batch in like_sized(task.sizes(split.dataset), size, task.largest)]
        padded, _ = world.share(batches)
        collate, workers = partial(task.collate, split.references), task.config.data.workers
        keys = [[(0, index) for index in batch] for batch in padded]
        found: dict[int, Any] = {}
        failures: set[str] = set()
        with Progress(f"{name} samples" if world.is_main else "", len(split.dataset)) as told:
            for batch, examples in zip(padded, load_batches(split.dataset, keys, collate, workers, world), strict=True):
                there = examples.to(world.device)
                outputs = self.engine(there.inputs, there.lengths, **task.arguments(there))
                found |= zip(batch, task.predict(outputs, there), strict=True)
                failures.update(examples.failures)
                told.advance(len(batch) * world.data_ranks)
        every = [(found, failures)]
        if world.size > 1:
            every = [({}, set())] * world.size
            dist.all_gather_object(every, (found, failures))
        whole = {index: prediction for part, _ in every for index, prediction in part.items()}
        lost = sorted(set().union(*(files for _, files in every)))
        if lost and world.is_main:
            self.note(f"{name}: could not decode {len(lost):,}: {few(lost)}")
        return [whole[index] for index in range(len(split.dataset))]


def predictions(weights: Full, task: Task) -> dict[str, list[Any]]:
    """What a network, in fp32 and in this process alone, predicts of the samples of each split; what cannot be read is
    told on the screen."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = weights.network()
    network.load_state_dict(weights.tensors)
    found = Evaluations(task, network.to(device).eval(), World(0, 1, device), steps=0, note=print)
    return {name: found.predictions(name, split) for name, split in task.evaluated.items()}
