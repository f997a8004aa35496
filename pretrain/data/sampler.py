"""Which samples a rank takes, as a pure function of (seed, position in the global stream)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from pretrain.config import BatchPlan

Key = tuple[int, int]  # (epoch, index of the sample in the data set)


class StreamSampler(Sampler[list[Key]]):
    """Endless micro-batches of (epoch, index) keys for one rank.

    All epochs form one stream, each shuffled anew; global batch g is the slice [g * G, (g + 1) * G) of it, across the
    end of an epoch if need be. A rank takes its share of each global batch, so the stream is the same for any number of
    ranks, micro-batches or restarts: starting at `first_batch` is all there is to resuming.
    """

    def __init__(self, length: int, plan: BatchPlan, rank: int, seed: int, first_batch: int = 0) -> None:
        if length < 1:
            raise ValueError("an empty data set has no stream")
        self.length, self.plan, self.rank, self.seed, self.first_batch = length, plan, rank, seed, first_batch
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __iter__(self) -> Iterator[list[Key]]:
        micro = self.plan.micro_batch
        share = micro * self.plan.accumulation
        batch = self.first_batch
        while True:
            start = batch * share * self.plan.ranks + self.rank * share
            for first in range(start, start + share, micro):
                yield [self.key(position) for position in range(first, first + micro)]
            batch += 1

    def key(self, position: int) -> Key:
        """The sample at a position of the global stream."""
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.length, self.seed, epoch)
        return epoch, int(self._order[offset])


def permutation(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)
