"""A checkpoint's encoder, frozen, without the engine that trained it; and the features that it gives a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack
from torch import Tensor
from torch.utils.data import DataLoader

from models.config import ModelConfig
from models.data2vec import Encoder
from models.masks import real_positions
from pretrain.data.sources import DataError, Sample, in_one_line
from pretrain.full import read
from pretrain.labelled.modality import MODALITIES
from pretrain.labelled.samples import Array, Inputs, Matrix, Modality, Represent, Samples, like_sized
from pretrain.progress import Progress


class Features(NamedTuple):
    positions: Tensor  # (B, T, D) fp32, extra tokens dropped
    pooled: Tensor  # (B, D), their mean, without padding


class FrozenEncoder:
    """An encoder in fp32 that no longer learns. Calling it gives what probes see: (B, D')."""

    def __init__(self, encoder: Encoder, config: ModelConfig, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = encoder.float().to(self.device).eval().requires_grad_(False)
        self.config = config

    @classmethod
    def untrained(cls, config: ModelConfig, seed: int) -> FrozenEncoder:
        """The same encoder before its first step: with a run's own seed, just what that run started from."""
        return cls(_fresh(config, seed), config)

    @torch.inference_mode()
    def features(self, inputs: Tensor, layer: int = -1, lengths: Tensor | None = None) -> Features:
        """Inputs as the model's batches have them, uint8 (B, C, H, W), waveforms (B, samples) or ids (B, T), with
        `lengths` (B,) in positions if some are padded -> features after main block `layer`, counted as Python counts.

        Raises IndexError if there is no such block.
        """
        block = range(self.config.depth)[layer]
        positions = next(islice(self._states(inputs, lengths), block + 1, None))
        real = real_positions(positions, lengths)
        return Features(positions, (positions * real).sum(dim=1) / real.sum(dim=1))

    @torch.inference_mode()
    def __call__(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        return MODALITIES[self.config.modality].seen(self._states(inputs, lengths), lengths, self.config)

    def _states(self, inputs: Tensor, lengths: Tensor | None) -> Iterator[Tensor]:
        """See `Encoder.states`."""
        lengths = None if lengths is None else lengths.to(self.device)
        assert self.encoder.local is not None
        return self.encoder.states(self.encoder.local(inputs.to(self.device), lengths), lengths)

    def represent(self, batch: Inputs) -> Tensor:
        return self(batch.inputs, batch.lengths)


def load_encoder(path: str | Path, which: str = "teacher") -> FrozenEncoder:
    """The teacher or the student, in fp32, of a full form, a run's newest or a given checkpoint.

    Raises ConfigError or CheckpointError, in one line, if it is not to be had.
    """
    full = read(path)
    encoder = _fresh(full.model, seed=0)
    encoder.load_state_dict(full.encoder(which))
    return FrozenEncoder(encoder, full.model)


def extract(
    encoder: FrozenEncoder,
    dataset: Samples,
    batch_size: int = 256,
    label: str = "",
    indices: Sequence[int] | None = None,
) -> Array:
    """What probes see (n, D) of a data set, in its order, which should be made with train=False if it can."""
    (found,), _ = extract_each([encoder.represent], dataset, encoder.config, batch_size, label, indices)
    assert isinstance(found, np.ndarray)
    return found


def extract_each(
    represent: Sequence[Represent],
    dataset: Samples,
    config: ModelConfig,
    batch_size: int = 256,
    label: str = "",
    indices: Sequence[int] | None = None,
    workers: int = 0,
) -> tuple[list[Matrix], NDArray[np.bool_]]:
    """Several representations of the samples `indices` (None: all), read once. -> one (n, D) each, in their order; and
    (n,) which samples are themselves, not others that stand in for what cannot be read.

    Samples of like length meet in a batch, of `batch_size` at most. Raises DataError, in one line, for what cannot be
    read.
    """
    modality = MODALITIES[config.modality]
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices, np.int64)
    batches = like_sized(modality.sizes(dataset)[chosen], batch_size, modality.largest)
    loader: DataLoader[tuple[Inputs, list[bool]]] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=[[(0, int(chosen[i])) for i in batch] for batch in batches],  # type: ignore[arg-type]
        collate_fn=partial(_collate, modality, config),
        num_workers=workers,
    )
    parts: list[list[Matrix]] = [[] for _ in represent]
    genuine: list[bool] = []
    with Progress(label, len(chosen)) as progress:
        try:
            for batch, themselves in loader:
                genuine += themselves
                for part, function in zip(parts, represent, strict=True):
                    found = function(batch)
                    part.append(found.float().cpu().numpy() if isinstance(found, Tensor) else found)
                progress.advance(len(batch.inputs))
        except DataError as error:
            raise in_one_line(error) from None
    places = np.argsort(np.concatenate(batches), kind="stable")
    return [_stacked(part)[places] for part in parts], np.array(genuine)[places]


def _collate(modality: Modality, config: ModelConfig, samples: Sequence[Sample]) -> tuple[Inputs, list[bool]]:
    return modality.collate(config, samples), [not sample.failures for sample in samples]


def _stacked(parts: list[Matrix]) -> Matrix:
    return vstack(parts, format="csr") if isinstance(parts[0], csr_matrix) else np.concatenate(parts)


def _fresh(config: ModelConfig, seed: int) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(config)
