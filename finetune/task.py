"""What a kind of fine-tuning has to say about itself; everything else is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from finetune.config import Config
from models.movable import Movable
from pretrain.config import BatchPlan
from pretrain.data.names import digest, few
from pretrain.data.sampler import StreamSampler
from pretrain.data.sources import DataError, Sample
from pretrain.labelled.samples import balanced_order
from pretrain.settings import ConfigError


@dataclass(frozen=True)
class Examples(Movable):
    """One micro-batch with what it is to be. A task may have a subclass with more."""

    inputs: Tensor  # as pre-training's batches have them, padded at the end where samples differ in length
    targets: Tensor  # (B,) classes or numbers, (B, C) shares of classes, or (B, S) letters, padded
    count: int  # what the loss is divided by, known without asking the device: samples, or letters
    lengths: Tensor | None = None  # (B,) positions that are no padding; None: all
    failures: tuple[str, ...] = ()  # files that had to be replaced while loading


class Some:
    """Some samples of a data set, by (epoch, place among them, ...); each keeps the `index` that it has in all."""

    def __init__(self, dataset: Any, indices: NDArray[np.int64]) -> None:
        self.dataset, self.indices = dataset, indices
        self.notes = (*dataset.notes, f"{len(indices):,} of {len(dataset):,} are learned from")
        self.assets = dataset.assets

    @classmethod
    def drawn(cls, dataset: Any, groups: NDArray[np.int64], config: Config) -> Some:
        """`data.labels` of the samples, evenly over `groups` (n,), by `train.seed`."""
        wanted = config.data.labels
        some = cls(dataset, np.sort(balanced_order(groups, config.train.seed)[:wanted]))
        if wanted is not None and wanted > len(groups):
            some.notes += (f"data.labels={wanted} is more than there are: {len(groups):,}",)
        return some

    def fingerprint(self) -> str:
        return digest(self.dataset.fingerprint().encode() + self.indices.tobytes())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, place, *rest = key
        return self.dataset[epoch, int(self.indices[place]), *rest]


class Split(NamedTuple):
    """Samples, and what each of them is to be, by its `index`."""

    dataset: Any
    references: Any


class Task(ABC):
    """Opens the data of a config, and raises ConfigError or DataError, in one line, if they will not do. `labels` are
    the names of the network's outputs."""

    train: Split
    evaluated: dict[str, Split]
    labels: list[str]
    largest: int  # sum of `sizes` that a batch of an evaluation may have, every sample padded to its longest

    def __init__(self, config: Config, progress: bool) -> None:
        self.config = config

    @property
    def resolved(self) -> Config:
        """The config with what only the data say. Raises ConfigError if `head.outputs` says otherwise."""
        given, outputs = self.config.head.outputs, len(self.labels)
        if given not in (0, outputs):
            raise ConfigError(f"head.outputs={given}, but there are {outputs:,} ({few(self.labels)}): leave it out")
        return replace(self.config, head=replace(self.config.head, outputs=outputs))

    @property
    def assets(self) -> dict[str, bytes]:
        """Files, by name, that the weights mean nothing without, beside labels.json."""
        return {}

    def sampler(self, plan: BatchPlan, rank: int, first_batch: int) -> Any:
        """What yields lists of keys of `train`, endlessly, from global batch `first_batch` on."""
        return StreamSampler(len(self.train.dataset), plan, rank, self.config.train.seed, first_batch)

    def sizes(self, dataset: Any) -> NDArray[np.int64]:
        """(n,) the length of each sample, 0 where all are alike."""
        return np.zeros(len(dataset), np.int64)

    def arguments(self, examples: Examples) -> dict[str, Any]:
        """What `FineTuned.forward` takes of them, beside inputs and lengths."""
        return {}

    @abstractmethod
    def collate(self, references: Any, samples: Sequence[Sample]) -> Examples: ...

    def augment(self, examples: Examples) -> Examples:
        """Of training's micro-batches, on the device; torch's generators are seeded by the step."""
        return examples

    @abstractmethod
    def loss(self, outputs: Tensor, examples: Examples) -> Tensor:
        """(), summed over what `examples.count` counts, in fp32."""

    @abstractmethod
    def predict(self, outputs: Tensor, examples: Examples) -> list[Any]:
        """What `judge` wants to know of each sample, on the host; None, if another stands in for it."""

    def score(self, split: str, predictions: list[Any]) -> dict[str, float]:
        """Figures of predictions for all samples of a split, in their order, without those that could not be read.
        Raises DataError if there are no others."""
        read = [i for i, prediction in enumerate(predictions) if prediction is not None]
        if not read:
            raise DataError(f"none of the {split} samples can be read")
        return self.judge(split, read, [predictions[i] for i in read])

    @abstractmethod
    def judge(self, split: str, indices: list[int], predictions: list[Any]) -> dict[str, float]:
        """Figures of some samples of a split: `predictions[k]` is of sample `indices[k]`, and none of them None."""

    @abstractmethod
    def best(self, figures: dict[str, float]) -> float:
        """Of the first split's figures, the one that chooses a checkpoint: the greater, the better."""
