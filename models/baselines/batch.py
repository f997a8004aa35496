"""Micro-batches whose rows hide different numbers of positions, and what is drawn for them (NumPy, in the loader).

As in `models.masks`, everything is a pure function of (seed, epoch, sample).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.baselines.config import MlmConfig
from models.masks import U64, below, random_words, uniform
from models.movable import Movable


@dataclass(frozen=True)
class Hidden(Movable):
    """One micro-batch: B samples of T positions, n of them hidden."""

    inputs: Tensor  # audio: (B, samples); text: (B, T) ids, of which some are replaced
    places: Tensor  # (n,) int64 ascending: position t of sample b is b * T + t
    truth: Tensor  # audio: (n, negatives) int64, which of the n are a position's distractors; text: (n,) true ids
    failures: tuple[str, ...] = ()  # files that had to be replaced while loading

    @property
    def masked(self) -> int:
        """What the loss is divided by, known without asking the device."""
        return len(self.places)

    @property
    def rows(self) -> int:
        return len(self.inputs)


def draw_negatives(keys: U64, hidden: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """(n, count) for the n hidden positions of (B, T), in their order: as many others of the same row, uniformly and
    with replacement, as places among the n (Baevski et al. 2020, wav2vec 2.0, 3.2). Rows hide two positions or more."""
    found, first = [], 0
    for key, own in zip(keys, hidden.sum(axis=1).tolist(), strict=True):
        chosen = below(random_words(np.array([key]), own * count), own - 1).reshape(own, count)
        chosen += chosen >= np.arange(own)[:, None]  # all but itself
        found.append(first + chosen)
        first += own
    return np.concatenate(found)


class Corrupted(NamedTuple):
    ids: NDArray[np.int64]  # (B, T)
    hidden: NDArray[np.bool_]  # (B, T), which of the true ones are to be told


def corrupt(keys: U64, ids: NDArray[np.int64], prob: float, config: MlmConfig, vocabulary: int, pad: int) -> Corrupted:
    """Hides the share `prob` of each row of ids (B, T), rounded up or down at random, at places drawn uniformly; what
    is seen there, `config` says (Devlin et al. 2018, BERT, 3.1; drawn anew each epoch: Liu et al. 2019, RoBERTa, 4.1).
    A random token is any but the padding."""
    length = ids.shape[1]
    words = random_words(keys, 1 + 3 * length)
    count = (prob * length + uniform(words[:, 0])).astype(np.int64)
    order, kind, other = np.split(words[:, 1:], 3, axis=1)
    hidden = order.argsort(axis=1).argsort(axis=1) < count[:, None]
    share = uniform(kind)
    token = below(other, vocabulary - 1)
    token += token >= pad
    mask = vocabulary if config.mask_id is None else config.mask_id
    seen = np.where(share < config.masked, mask, np.where(share < config.masked + config.random, token, ids))
    return Corrupted(np.where(hidden, seen, ids), hidden)
