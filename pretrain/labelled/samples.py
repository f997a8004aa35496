"""What probes ask of a modality, and what they share: labelled splits, batches of samples that differ in length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from models.config import ModelConfig
from pretrain.config import Config
from pretrain.data.sources import DataError, Sample

Array = NDArray[np.float32]
Matrix = Array | csr_matrix  # (n, D)
Labels = NDArray[np.int64]


class NoProbe(DataError):
    """The data cannot say how good features are: no labels, or nothing held out."""


class Inputs(NamedTuple):
    """Some samples as the encoder takes them."""

    inputs: Tensor  # stacked; shorter samples padded at the end
    lengths: Tensor | None = None  # (B,) positions that are no padding; None: nothing is padded
    samples: Sequence[Sample] = ()  # as they were, where baselines want to know


Represent = Callable[[Inputs], Tensor | csr_matrix]  # -> (B, D)


class Samples(Protocol):
    """Samples by (epoch, index)."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> Sample: ...


@dataclass(frozen=True)
class Labelled:
    """Training and test samples, whole and not augmented, with labels that mean the same in both."""

    train: Any  # Samples
    test: Any
    train_y: Labels
    test_y: Labels
    classes: list[str]


@dataclass(frozen=True)
class Modality:
    """One modality's part in the probes: functions and words."""

    unit: str  # what labelled samples are called
    position: str  # what one position is called
    baseline: str  # name of the features that need no model
    largest: int  # sum of `sizes` that a batch may have, every sample padded to its longest
    labelled: Callable[[Config, str, Path | None], Labelled]
    """(config, path of the data, run folder if there is one). Raises NoProbe, in one line."""
    unlabelled: Callable[[Config, Path | None], Any]
    """The run's own training samples, for a picture without labels."""
    sizes: Callable[[Any], NDArray[np.int64]]
    """The length of each sample of one of the data sets, (n,)."""
    collate: Callable[[ModelConfig, Sequence[Sample]], Inputs]
    seen: Callable[[Iterator[Tensor], Tensor | None, ModelConfig], Tensor]
    """(local features and then each block's output, (B, T, D); lengths; config) -> what probes see, (B, D')."""
    plain: Callable[[Any, Sequence[int]], Represent]
    """(training samples, those that may be used) -> the baseline's representation, fitted on them if it has to be."""
    facts: Callable[[Config], tuple[str, str]]
    """(what a sample is, what a step takes), for a heading."""


def collate_genuine(
    modality: Modality, config: ModelConfig, samples: Sequence[Sample]
) -> tuple[Inputs, list[tuple[str, ...]]]:
    """Samples as the encoder takes them; and of each the files that could not be read on the way to it: if there are
    any, another one stands in for it."""
    return modality.collate(config, samples), [sample.failures for sample in samples]


class Source(Protocol):
    """What lies in one split."""

    @property
    def labels(self) -> NDArray[Any] | None: ...

    @property
    def classes(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...


S = TypeVar("S", bound=Source)


def open_splits(open_split: Callable[[str, str], S], path: str, kind: str) -> tuple[S, S]:
    """The `train` and `test` splits at `path`, of samples called `kind`. Raises NoProbe if they cannot judge."""
    train = open_split(path, "train")
    if train.labels is None:
        raise NoProbe(f"no probe: the {kind} of {path} have no labels")
    try:
        test = open_split(path, "test")
    except DataError as error:
        raise NoProbe(f"no probe: no test {kind} ({error})") from None
    refuse_shared((test.name(i) for i in range(len(test))), (train.name(i) for i in range(len(train))), path, kind)
    if test.labels is None:
        raise NoProbe(f"no probe: the test {kind} of {path} have no labels")
    strange = [test.classes[i] for i in np.unique(test.labels) if test.classes[i] not in train.classes]
    if strange:
        raise NoProbe(f"no probe: {path} has test {kind} of classes without training {kind}: {', '.join(strange[:5])}")
    return train, test


def refuse_shared(test: Iterable[str], train: Iterable[str], path: str, kind: str) -> None:
    """Raises NoProbe if some of the `test` samples are `train` samples too."""
    held_out = set(test)
    if shared := len(held_out.intersection(train)):
        raise NoProbe(f"no probe: {shared:,} of {len(held_out):,} test {kind} of {path} are training {kind} too")


def renumbered(labels: Labels, classes: Sequence[str], as_in: Sequence[str]) -> Labels:
    """Labels that index `classes` -> those that index `as_in` (-1: not in it)."""
    number = np.array([as_in.index(c) if c in as_in else -1 for c in classes], np.int64)
    return number[labels]


def balanced_order(labels: Labels, seed: int) -> Labels:
    """An order whose every beginning is as class-balanced as the data allow, so that smaller subsets lie in larger."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    rank = np.empty(len(labels), np.int64)  # of each sample among those of its class
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    return np.lexsort((rng.random(len(labels)), rank))


def spread(labels: Labels, most: int) -> Labels:
    """Indices of at most `most` samples, evenly over classes, ascending."""
    return np.sort(balanced_order(labels, seed=0)[:most])


def pad(samples: Sequence[Sample], config: ModelConfig, value: float = 0) -> Inputs:
    """1-D samples stacked, `value` behind the shorter ones; lengths in positions."""
    each = [sample.inputs for sample in samples]
    sizes = [len(inputs) for inputs in each]
    inputs = torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=value)
    lengths = None if min(sizes) == max(sizes) else torch.tensor([config.grid(size)[0] for size in sizes])
    return Inputs(inputs, lengths, samples)


def last(states: Iterator[Tensor]) -> Tensor:
    """The encoder's output, without keeping what comes before it."""
    for state in states:
        output = state
    return output


def like_sized(sizes: NDArray[np.int64], count: int, largest: int) -> list[NDArray[np.int64]]:
    """Batches of samples of like length, as indices into `sizes`, the longest samples first, so that what is too much
    for the memory is too much at once. Each has at most `count` samples and, padded to its longest, at most `largest`
    of whatever `sizes` count, or is one sample."""
    order = np.argsort(-sizes, kind="stable")
    batches, first = [], 0
    while first < len(order):
        fits = max(1, min(count, largest // int(sizes[order[first]]) if sizes[order[first]] else count))
        batches.append(order[first : first + fits])
        first += fits
    return batches
