"""Speech for pre-training: windows of recordings, normalised and cropped.

`AudioDataset` turns a recording of a source into a waveform. Every random choice is a pure function of (seed, epoch,
index), so a run gives the same samples for any number of ranks and workers and after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from models.config import RATE
from pretrain.data.recordings import AudioSource
from pretrain.data.sources import DataError, Sample, read_or_replace

_CROP_STREAM = 0x61756469
_LONGEST = 17  # more than a broken one and all its stand-ins
_SILENCE = 2.0**-15  # one step of 16 bits


@dataclass(eq=False)
class AudioDataset(torch.utils.data.Dataset):
    """Waveforms of a source's recordings of `min_seconds` or more.

    With `train`, asked for by (epoch, index, samples): a random window of `max_seconds`, or all of a shorter
    recording, is normalised to mean 0 and variance 1, and `samples` in a row are taken out of it at random. Without,
    by (epoch, index): the first `max_seconds`, normalised, whole. A recording that cannot be decoded, is shorter than
    its header says, holds not-a-number or infinity, or is silent, is replaced by another one that is long enough, or,
    should too few be, by one of the longest, repeated.

    Raises `DataError` if no recording is long enough.
    """

    source: AudioSource
    _: KW_ONLY
    seed: int
    min_seconds: float = 2.0
    max_seconds: float = 20.0
    train: bool = True
    assets: ClassVar[tuple[Path, ...]] = ()
    lengths: NDArray[np.int64] = field(init=False)
    """int64 (n,), the samples at 16 kHz of each usable recording, `max_seconds` at most."""
    labels: np.ndarray | None = field(init=False)
    classes: list[str] = field(init=False)
    notes: tuple[str, ...] = field(init=False)
    """What is used and what is left out, in sentences for the user."""

    def __post_init__(self) -> None:
        least, most = round(self.min_seconds * RATE), round(self.max_seconds * RATE)
        if not 1 <= least <= most:
            raise DataError(
                f"min_seconds={self.min_seconds} must be positive and max_seconds={self.max_seconds} no less"
            )
        lengths = self.source.lengths
        self._used = np.flatnonzero(lengths >= least)
        short = np.flatnonzero(lengths < least)
        if not len(self._used):
            longest = lengths.max() / RATE
            raise DataError(
                f"none of {len(lengths):,} recordings lasts min_seconds={self.min_seconds}: {longest:.2f} s at most"
            )
        self.lengths = np.minimum(lengths[self._used], most)
        self._by_length = np.argsort(self.lengths, kind="stable")
        self.labels = None if self.source.labels is None else self.source.labels[self._used]
        self.classes = self.source.classes
        self.notes = tuple(self._notes(short, int((lengths > most).sum())))

    def _notes(self, short: NDArray[np.int64], long: int) -> list[str]:
        hours = self.source.lengths[self._used].sum() / RATE / 3600
        windows = f", {long:,} of them longer than {self.max_seconds:g} s and read by window" if long else ""
        notes = [f"{len(self):,} recordings, {hours:.2f} h{windows}"]
        if len(short):
            names = _first([self.source.name(i) for i in short[:3]], len(short))
            notes.append(f"left out {len(short):,} recordings shorter than {self.min_seconds:g} s: {names}")
        if skipped := self.source.skipped:
            notes.append(
                f"left out {len(skipped):,} recordings that cannot be read: {_first(skipped[:3], len(skipped))}"
            )
        return notes

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def __len__(self) -> int:
        return len(self._used)

    def __getitem__(self, key: tuple[int, int, int] | tuple[int, int]) -> Sample:
        """The sample of (epoch, index, samples) or, if not `train`, of (epoch, index).

        Raises `IndexError` for an index outside the data set, `ValueError` for more samples than the recording has,
        and `DataError` after 16 unusable recordings.
        """
        epoch, index = key[:2]
        if not 0 <= index < len(self):
            raise IndexError(f"recording {index} of {len(self)}")
        samples: int | None = None
        others = self._by_length
        if self.train:
            samples = key[-1]
            if not 1 <= samples <= self.lengths[index]:
                raise ValueError(f"{samples} samples of recording {index}, which has {self.lengths[index]}")
            long_enough = int(np.searchsorted(self.lengths, samples, sorter=others))
            others = others[min(long_enough, max(0, len(others) - _LONGEST)) :]

        def read(chosen: int) -> torch.Tensor:
            return self._waveform(chosen, samples, np.random.default_rng([_CROP_STREAM, self.seed, epoch, index]))

        inputs, failures = read_or_replace(read, self.name, index, instead=others, seed=self.seed, kind="recordings")
        return Sample(inputs, epoch, index, failures)

    def name(self, index: int) -> str:
        """The path of recording `index`."""
        return self.source.name(int(self._used[index]))

    def _waveform(self, index: int, samples: int | None, rng: np.random.Generator) -> torch.Tensor:
        number, count = int(self._used[index]), int(self.lengths[index])
        start = int(rng.integers(self.source.lengths[number] - count + 1)) if self.train else 0
        window = self.source.read(number, start, count)
        if len(window) < count:
            raise DataError(
                f"truncated: {start + len(window)} samples at 16 kHz, not the {start + count} it should have"
            )
        if np.ptp(window) < _SILENCE:
            raise DataError("silent" if count == self.source.lengths[number] else f"silent from sample {start} on")
        waveform = F.layer_norm(torch.from_numpy(window), (count,), eps=1e-5)
        # A sum of normalised samples is too small to overflow, and all() takes far longer.
        if not waveform.sum().isfinite():
            raise DataError("its samples are not all finite, or too large")
        if samples is None:
            return waveform
        if samples > count:  # a stand-in
            waveform = waveform.repeat(-(-samples // count))
        first = int(rng.integers(len(waveform) - samples + 1))
        return waveform[first : first + samples].clone()  # alone, without the window that it is part of


def _first(names: Sequence[str], count: int) -> str:
    return ", ".join(names) + (", ..." if count > len(names) else "")
