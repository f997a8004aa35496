"""Probes of speech: whole clips, mean and deviation of their frames, statistics of MFCCs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.mfcc import WINDOW, mfcc_statistics
from finetune.samples import Inputs, Labelled, Modality, Represent, open_splits, pad, renumbered, valid
from models.config import RATE, ModelConfig
from pretrain.config import Config
from pretrain.data.audio import AudioDataset
from pretrain.data.fetch import resolve
from pretrain.data.recordings import AudioSource, open_audio
from pretrain.data.sources import Sample


def labelled(config: Config, path: str, run: Path | None = None) -> Labelled:
    source, held_out = open_splits(open_audio, path, AUDIO.unit)
    train, test = whole_clips(source, config), whole_clips(held_out, config)
    assert train.labels is not None and test.labels is not None
    return Labelled(train, test, train.labels, renumbered(test.labels, test.classes, train.classes), train.classes)


def unlabelled(config: Config, run: Path | None = None) -> AudioDataset:
    return whole_clips(open_audio(resolve(config.data.path), config.data.split), config)


def whole_clips(source: AudioSource, config: Config) -> AudioDataset:
    """Clips from their beginning, as long as pre-training's longest at most and one frame at least."""
    return AudioDataset(
        source,
        seed=config.train.seed,
        min_seconds=shortest(config.model) / RATE,
        max_seconds=config.model.audio.seconds,
        train=False,
    )


def shortest(config: ModelConfig) -> int:
    """Samples that give one frame and fill one window of MFCCs."""
    samples = 1
    for kernel, stride in zip(reversed(config.audio.kernels), reversed(config.audio.strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return max(samples, WINDOW)


def sizes(clips: AudioDataset) -> NDArray[np.int64]:
    return clips.lengths


def collate(config: ModelConfig, samples: Sequence[Sample]) -> Inputs:
    """-> (B, samples) float32, silence behind the shorter ones."""
    return pad(samples, config)


def mean_and_deviation(positions: Tensor, lengths: Tensor | None, config: ModelConfig) -> Tensor:
    """(B, T, D) -> (B, 2 * D) over the frames of each clip: who speaks is also in how much things change."""
    real = valid(positions, lengths)
    count = real.sum(dim=1)
    mean = (positions * real).sum(dim=1) / count
    variance = ((positions - mean[:, None]).square() * real).sum(dim=1) / count
    return torch.cat([mean, variance.sqrt()], dim=1)


def plain(train: AudioDataset, indices: Sequence[int]) -> Represent:
    return lambda batch: torch.stack([mfcc_statistics(sample.inputs) for sample in batch.samples])


def facts(config: Config) -> tuple[str, str]:
    model = config.model
    frame = 1000 * np.prod(model.audio.strides) / RATE
    return f"{model.positions} frames of {frame:g} ms", f"{config.train.batch_size / RATE:,.0f} s of speech"


AUDIO = Modality(
    unit="clips",
    position="frames",
    baseline="MFCCs",
    largest=64 * RATE,
    labelled=labelled,
    unlabelled=unlabelled,
    sizes=sizes,
    collate=collate,
    seen=mean_and_deviation,
    plain=plain,
    facts=facts,
)
