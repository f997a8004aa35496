"""Which recordings of like length make up a micro-batch, as a pure function of (seed, position in the stream)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from models.config import RATE
from pretrain.config import BatchPlan
from pretrain.data.sampler import permutation
from pretrain.settings import ConfigError

Key = tuple[int, int, int]  # (epoch, index of the recording in the data set, samples to read of it)

_PACK_STREAM = 0x7061636B


@dataclass(frozen=True)
class _Epoch:
    """The packs of an epoch, in their order: pack p holds `clips[starts[p]:ends[p]]`."""

    clips: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class PackSampler(Sampler[list[Key]]):
    """Endless packs of (epoch, index, samples) keys for one rank; a pack is a micro-batch.

    `lengths` (n,) are the recordings' samples and `plan.micro_batch` bounds those of a pack: its recordings times the
    shortest, to which all are cropped (or to the `multiple` below it, so that fewer shapes have to be prepared for),
    or with `padded` times the longest, and each keeps its own length. Every epoch shuffles the recordings, sorts them
    by length within pools of `pool` or a little fewer, fills packs greedily, and shuffles the packs; each recording is
    in one of them.

    The packs of all epochs form one stream, and global batch g is the slice [g * N, (g + 1) * N) of it, across the end
    of an epoch if need be, where N = ranks x accumulation. So the stream is the same for any number of ranks or
    restarts: starting at `first_batch` is all there is to resuming.

    Raises `ConfigError` if a recording alone exceeds the bound.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        plan: BatchPlan,
        rank: int,
        seed: int,
        first_batch: int = 0,
        pool: int = 4096,
        padded: bool = False,
        multiple: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        if not len(self.lengths):
            raise ValueError("an empty data set has no stream")
        if self.lengths.min() < 1 or pool < 1:
            raise ValueError("recordings and pools have at least one sample")
        if (longest := int(self.lengths.max())) > plan.micro_batch:
            raise ConfigError(
                f"a micro-batch of {plan.micro_batch:,} samples cannot hold the longest recording, {longest:,} "
                f"({longest / RATE:.1f} s at 16 kHz): allow that many, or crop recordings shorter"
            )
        self.plan, self.rank, self.seed, self.first_batch = plan, rank, seed, first_batch
        self.pool, self.padded, self.multiple = pool, padded, multiple

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.plan.accumulation
        position = self.first_batch * self.plan.ranks * share + self.rank * share
        number, base = 0, 0  # the epoch, and the position of its first pack
        epoch = self._epoch(number)
        while True:
            for place in range(position, position + share):
                while place >= base + len(epoch.starts):
                    base += len(epoch.starts)
                    number += 1
                    epoch = self._epoch(number)
                yield self._keys(number, epoch, place - base)
            position += share * self.plan.ranks

    def _keys(self, number: int, epoch: _Epoch, pack: int) -> list[Key]:
        clips = epoch.clips[epoch.starts[pack] : epoch.ends[pack]]
        lengths = self.lengths[clips]
        shortest = lengths.min()
        cropped = shortest - shortest % self.multiple or shortest
        samples = lengths if self.padded else np.full_like(lengths, cropped)
        return [(number, clip, count) for clip, count in zip(clips.tolist(), samples.tolist(), strict=True)]

    def _epoch(self, number: int) -> _Epoch:
        order = permutation(len(self.lengths), self.seed, number)
        cuts: list[int] = []
        # Equal pools, as one of a few recordings alone would pack long ones with short; and several even if one would
        # do, as recordings would meet the same neighbours in every epoch.
        pools = np.array_split(order, max(-(-len(order) // self.pool), min(4, len(order) // 500)))
        for first, pool in zip(np.cumsum([0, *map(len, pools)]).tolist(), pools, strict=False):
            lengths = self.lengths[pool]
            by_length = np.argsort(-lengths if self.padded else lengths, kind="stable")
            pool[:] = pool[by_length]  # a view of order
            cuts += [first + cut for cut in self._cut(lengths[by_length])]
        edges = np.array([*cuts, len(order)])
        shuffled = np.random.default_rng([_PACK_STREAM, self.seed, number]).permutation(len(cuts))
        return _Epoch(order, edges[:-1][shuffled], edges[1:][shuffled])

    def _cut(self, lengths: NDArray[np.int64]) -> list[int]:
        """Where packs begin in a pool sorted so that a pack's first recording is the one that bounds it."""
        fits = (self.plan.micro_batch // lengths).tolist()
        cuts, start = [], 0
        while start < len(fits):
            cuts.append(start)
            start += fits[start]
        if len(cuts) > 1:
            # The last pack is what was left over, one recording at worst: it takes half of the one before.
            middle = (cuts[-2] + len(fits) + 1) // 2
            if middle < cuts[-1] and len(fits) - middle <= fits[middle]:
                cuts[-1] = middle
        return cuts
