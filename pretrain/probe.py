"""Probes of the teacher while it trains: what its features tell about classes, on a few labelled samples.

`finetune.probe` measures with care, afterwards and on few labels; this says every few hundred steps which way it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.data2vec import FullView
from pretrain.config import BatchPlan, Config
from pretrain.data.fetch import resolve
from pretrain.data.loader import load_batches
from pretrain.data.sources import DataError
from pretrain.labelled.modality import MODALITIES
from pretrain.labelled.samples import Inputs, Labels, collate_genuine, like_sized, spread
from pretrain.parallel import World
from pretrain.progress import Progress
from pretrain.settings import ConfigError

KEPT = 1 << 30  # bytes of decoded samples that a rank keeps for the next probe; what is more is read again
RIDGE = 0.003  # of what the features' Gram matrix has on its diagonal in the mean

Loaded = tuple[Inputs, list[tuple[str, ...]]]


class Probe:
    """An Evaluation (`pretrain.loop`) that finds `probe/knn` and `probe/linear`, shares of test samples told right.

    The data ranks share the samples. Raises ConfigError, in one line, for
    data that cannot judge features.
    """

    def __init__(self, config: Config, engine: Any, plan: BatchPlan, world: World, note: Callable[[str], None]) -> None:
        self.config, self.engine, self.plan, self.world, self._note = config, engine, plan, world, note
        self.modality, probe = MODALITIES[config.model.modality], config.probe
        seen = self.modality.seen
        self._see = lambda states, lengths: seen(states, lengths, config.model)
        try:
            path = resolve(probe.path or config.data.path)
            self.data = self.modality.labelled(config, path, Path(config.run.dir))
        except DataError as error:
            raise ConfigError(f"probe.every={probe.every}: {error}; or set probe.every=0") from None
        self._chosen = {"train": spread(self.data.train_y, probe.samples), "test": spread(self.data.test_y, probe.test)}
        self._kept: dict[str, list[Loaded]] = {}
        self._room = KEPT
        self._began, self._spent, self._last, self._count = time.monotonic(), 0.0, 0.0, 0

    def due(self, step: int) -> bool:
        """Every probe.every steps, unless rank 0 finds that it would take too much of the time. The first probe, whose
        cost nobody knows yet, always fits. Collective."""
        probe = self.config.probe
        if step % probe.every:
            return False
        elapsed = time.monotonic() - self._began
        fits = self.world.as_main(self._spent + self._last <= probe.share * (elapsed + self._last))
        if not fits and self.world.is_main:
            self._note(
                f"step {step}: no probe; it would take {self._last:.1f} s, the {self._count} so far have taken "
                f"{100 * self._spent / elapsed:.1f} % of the time, and probe.share={probe.share}"
            )
        return fits

    def score(self, found: dict[str, float]) -> None:
        """No checkpoint is chosen by a probe."""

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        began, world, neighbours = time.monotonic(), self.world, self.config.probe.neighbours
        self.engine.eval()
        train_x, train_y = self._features("train", self.data.train, self.data.train_y)
        test_x, test_y = self._features("test", self.data.test, self.data.test_y)
        self.engine.train()
        own = slice(world.data_rank, None, world.data_ranks)
        told = by_neighbours(train_x, train_y, test_x[own], neighbours), by_ridge(train_x, train_y, test_x[own])
        right = world.sum(torch.stack([(found == test_y[own]).sum() for found in told])).tolist()
        self._last = time.monotonic() - began
        self._spent += self._last
        self._count += 1
        return {name: count / len(test_y) for name, count in zip(("probe/knn", "probe/linear"), right, strict=True)}

    def _features(self, split: str, dataset: Any, labels: Labels) -> tuple[Tensor, Tensor]:
        """What probes see (n, D) of a split's chosen samples, but those that cannot be read, and their labels (n,); the
        same on all ranks."""
        world, chosen = self.world, self._chosen[split]
        batches = like_sized(self.modality.sizes(dataset)[chosen], *self._most())
        padded, own = world.share(batches)
        rows: Tensor | None = None  # (chosen, D+1), zeros where others have theirs; the last column: it could be read
        with Progress(f"probe: {split} {self.modality.unit}" if world.is_main else "", len(chosen)) as progress:
            for number, (inputs, failures) in enumerate(self._loaded(split, dataset, padded)):
                view = FullView(inputs.inputs, inputs.lengths, self._see).to(world.device)
                seen = self.engine(view)
                if rows is None:
                    rows = seen.new_zeros(len(chosen), seen.shape[1] + 1)
                if number < own:
                    genuine = torch.tensor([not names for names in failures], device=world.device)
                    at = torch.from_numpy(padded[number]).to(world.device)
                    rows[at] = torch.cat([seen, genuine[:, None]], dim=1) * genuine[:, None]
                progress.advance(min(len(seen) * world.data_ranks, len(chosen) - progress.done))
        assert rows is not None
        world.sum(rows)
        genuine = rows[:, -1] > 0
        return rows[genuine, :-1], torch.from_numpy(labels[chosen]).to(world.device)[genuine]

    def _loaded(self, split: str, dataset: Any, batches: list[NDArray[np.int64]]) -> Iterator[Loaded]:
        """Batches of a split, whose samples are given by their places among the chosen ones."""
        if split in self._kept:
            yield from self._kept[split]
            return
        config, chosen = self.config, self._chosen[split]
        keys = [[(0, int(index)) for index in chosen[batch]] for batch in batches]
        collate, kept = partial(collate_genuine, self.modality, config.model), []
        for inputs, failures in load_batches(dataset, keys, collate, config.data.workers, self.world):
            yield inputs, failures
            self._room -= inputs.inputs.nbytes
            if self._room >= 0:
                own = inputs.lengths if inputs.lengths is None else inputs.lengths.clone()
                # Clones: a batch's tensors lie in one piece of memory, which any of them keeps.
                kept.append((inputs._replace(inputs=inputs.inputs.clone(), lengths=own, samples=()), failures))
        if self._room >= 0:
            self._kept[split] = kept

    def _most(self) -> tuple[int, int]:
        """Samples of a batch, and the sum of their `sizes`: as many views as training has in a micro-batch, and nothing
        is kept of them for a gradient."""
        model = self.config.model
        views = self.plan.micro_batch * model.num_masks
        largest = views * model.length if model.modality == "text" else views
        return largest, largest


def by_neighbours(train_x: Tensor, train_y: Tensor, test_x: Tensor, most: int) -> Tensor:
    """Classes (m,) of `test_x` (m, D) by `most` neighbours, or as few as a class has, of greatest cosine between
    features centred on `train_x` (n, D); a vote counts for more the nearer it is."""
    k = min(most, int(torch.bincount(train_y)[train_y.unique()].min()))
    centre = train_x.mean(dim=0)
    cosine, nearest = (F.normalize(test_x - centre) @ F.normalize(train_x - centre).T).topk(k)
    weights = (2 - 2 * cosine).clamp(min=1e-12).rsqrt()  # one over the distance of unit vectors
    votes = weights.new_zeros(len(test_x), int(train_y.max()) + 1)
    return votes.scatter_add_(1, train_y[nearest], weights).argmax(dim=1)


def by_ridge(train_x: Tensor, train_y: Tensor, test_x: Tensor) -> Tensor:
    """Classes (m,) of `test_x` (m, D) by ridge regression of classes, one column each, on standardised features; solved
    in closed form, in whichever of samples and features there are fewer."""
    mean, std = train_x.mean(dim=0), train_x.std(dim=0)
    std[std < 1e-6 * std.max().clamp(min=1e-12)] = torch.inf  # a constant says nothing; on test it may differ
    x, test = (train_x - mean) / std, (test_x - mean) / std
    y = F.one_hot(train_y).float()
    centred = y - y.mean(dim=0)
    gram = x.T @ x if x.shape[1] < len(x) else x @ x.T
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram)
    if x.shape[1] < len(x):
        weights = torch.cholesky_solve(x.T @ centred, factor)
    else:
        weights = x.T @ torch.cholesky_solve(centred, factor)
    return (test @ weights + y.mean(dim=0)).argmax(dim=1)
