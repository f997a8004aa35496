"""Samples of one micro-batch -> `Batch`: inputs stacked, M masks a sample drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from models.config import ModelConfig
from models.data2vec import Batch
from models.masks import draw_block_masks, row_keys, sample_keys
from pretrain.data.sources import Sample


class Collate:
    """Runs in the loader's workers. Masks and noise depend on (seed, epoch, sample, mask) and on nothing else."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.model, self.seed = model, seed

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        epochs = np.array([s.epoch for s in samples])
        indices = np.array([s.index for s in samples])
        keys = row_keys(self.seed, epochs, indices, self.model.num_masks)
        inputs = torch.stack([s.inputs for s in samples])
        masks = draw_block_masks(self.model.mask, keys, self.model.grid(inputs.shape[-1]))
        failures = tuple(failure for s in samples for failure in s.failures)
        seeds = tuple((sample_keys(self.seed, epochs, indices) >> np.uint64(1)).tolist())
        return Batch(inputs, masks.ids_keep, masks.ids_mask, seeds, failures)
