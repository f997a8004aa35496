"""Samples of one micro-batch -> `Batch`, or for some baselines `Hidden`: inputs stacked, masks drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.baselines.batch import Hidden, corrupt, draw_negatives
from models.config import ModelConfig
from models.data2vec import Batch
from models.masks import U64, draw_block_masks, draw_spans, row_keys, sample_keys
from pretrain.data.sources import Sample


class Collate:
    """Runs in the loader's workers. Masks and noise depend on (seed, epoch, sample, mask) and on nothing else."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.model, self.seed = model, seed

    def __call__(self, samples: Sequence[Sample]) -> Any:
        keys, inputs, failures = self.stacked(samples, self.model.num_masks)
        masks = draw_block_masks(self.model.mask, keys.reshape(-1), self.model.grid(inputs.shape[-1]))
        seeds = sample_keys(self.seed, *positions(samples)) >> np.uint64(1)
        return Batch(inputs, masks.ids_keep, masks.ids_mask, tuple(seeds.tolist()), failures)

    def stacked(self, samples: Sequence[Sample], draws: int) -> tuple[U64, torch.Tensor, tuple[str, ...]]:
        """(B, draws) keys, inputs (B, ...), and files that had to be replaced."""
        keys = row_keys(self.seed, *positions(samples), draws).reshape(-1, draws)
        failures = tuple(failure for s in samples for failure in s.failures)
        return keys, torch.stack([s.inputs for s in samples]), failures


def positions(samples: Sequence[Sample]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Their epochs and their numbers in the data set, (B,) each."""
    return np.array([s.epoch for s in samples]), np.array([s.index for s in samples])


class Spans(Collate):
    """wav2vec 2.0's: spans of hidden frames, two of them at least, and for each frame its distractors."""

    def __call__(self, samples: Sequence[Sample]) -> Hidden:
        keys, inputs, failures = self.stacked(samples, 2)
        mask, (frames,) = self.model.mask, self.model.grid(inputs.shape[-1])
        lengths = np.full(len(inputs), frames)
        hidden = draw_spans(keys[:, 0], lengths, frames, mask.prob, mask.length, least=2)
        negatives = draw_negatives(keys[:, 1], hidden, self.model.wav2vec2.negatives)
        return Hidden(inputs, places(hidden), torch.from_numpy(negatives), failures)


class Replaced(Collate):
    """Masked language modelling's: tokens to be told, most of them replaced."""

    def __call__(self, samples: Sequence[Sample]) -> Hidden:
        keys, inputs, failures = self.stacked(samples, 1)
        model = self.model
        text, ids = model.text, inputs.numpy()
        seen, hidden = corrupt(keys[:, 0], ids, model.mask.prob, model.mlm, text.vocabulary, text.pad)
        return Hidden(torch.from_numpy(seen), places(hidden), inputs[torch.from_numpy(hidden)], failures)


def places(hidden: NDArray[np.bool_]) -> torch.Tensor:
    """(B, T) -> (n,) int64 ascending, of what is hidden."""
    return torch.from_numpy(np.flatnonzero(hidden))


COLLATES: dict[str, type[Collate]] = {"data2vec2": Collate, "mae": Collate, "wav2vec2": Spans, "mlm": Replaced}
"""By `model.objective`."""
