"""Probes of speech: whole clips, mean and deviation of their frames, statistics of MFCCs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.config import RATE, ModelConfig
from models.masks import real_positions
from pretrain.config import Config
from pretrain.data.audio import AudioDataset
from pretrain.data.fetch import resolve
from pretrain.data.recordings import AudioSource, open_audio
from pretrain.data.sources import Sample
from pretrain.labelled.mfcc import WINDOW, mfcc_statistics
from pretrain.labelled.samples import Inputs, Labelled, Modality, Represent, open_splits, pad, renumbered


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


def mean_and_deviation(states: Iterator[Tensor], lengths: Tensor | None, config: ModelConfig) -> Tensor:
    """-> (B, 2 * D), over the frames of each clip, of the sum of all states, normalised: who speaks is also in how
    much things change, and in low blocks, as targets are normalised over time and lose what a clip has in common.

    SUPERB (Yang et al., Interspeech 2021) lets probes see such a sum, with learned weights.
    """
    positions = torch.stack([F.layer_norm(state, state.shape[-1:]) for state in states]).sum(dim=0)
    real = real_positions(positions, lengths)
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
