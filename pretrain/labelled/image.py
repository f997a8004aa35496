"""Probes of images: centre crops, the means of four quarters, raw pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.config import ModelConfig
from pretrain.config import Config
from pretrain.data.fetch import resolve
from pretrain.data.image import ImageDataset
from pretrain.data.sources import ImageSource, Sample, open_images
from pretrain.labelled.samples import Inputs, Labelled, Modality, Represent, last, open_splits, renumbered

CELLS = 2  # a side: probes see the means of the four quarters, for where things are in a picture is worth keeping
PIXEL_EDGE = 32  # larger images are averaged down before their pixels count as features
PIXELS = "raw pixels"


def labelled(config: Config, path: str, run: Path | None = None) -> Labelled:
    train, test = open_splits(open_images, path, IMAGE.unit)
    assert train.labels is not None and test.labels is not None
    test_y = renumbered(test.labels, test.classes, train.classes)
    return Labelled(centre_crops(train, config), centre_crops(test, config), train.labels, test_y, train.classes)


def unlabelled(config: Config, run: Path | None = None) -> ImageDataset:
    return centre_crops(open_images(resolve(config.data.path), config.data.split), config)


def centre_crops(source: ImageSource, config: Config) -> ImageDataset:
    image = config.model.image
    return ImageDataset(
        source,
        size=image.size,
        seed=config.train.seed,
        channels=image.channels,
        max_pixels=config.data.image.max_pixels,
        draft=config.data.image.draft,
        train=False,
    )


def sizes(images: ImageDataset) -> NDArray[np.int64]:
    """All alike, whatever their number of pixels."""
    return np.zeros(len(images), np.int64)


def collate(config: ModelConfig, samples: Sequence[Sample]) -> Inputs:
    """-> (B, C, H, W) uint8."""
    return Inputs(torch.stack([sample.inputs for sample in samples]))


def quarters(states: Iterator[Tensor], lengths: Tensor | None, config: ModelConfig) -> Tensor:
    """-> (B, CELLS**2 * D), the means of the last block's output over cells of the picture."""
    grid = last(states).transpose(1, 2).unflatten(2, config.grid_shape)
    return F.adaptive_avg_pool2d(grid, CELLS).flatten(1)


def raw_pixels(pixels: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> (B, C*h*w) in [0, 1], averaged down to at most PIXEL_EDGE a side."""
    scaled = pixels.float() / 255
    if scaled.shape[-1] > PIXEL_EDGE:
        scaled = F.adaptive_avg_pool2d(scaled, PIXEL_EDGE)
    return scaled.flatten(1)


def plain(train: ImageDataset, indices: Sequence[int]) -> Represent:
    return lambda batch: raw_pixels(batch.inputs)


def facts(config: Config) -> tuple[str, str]:
    model = config.model
    edge = f"{model.image.patch} \N{MULTIPLICATION SIGN} {model.image.patch}"
    return f"{model.positions} patches of {edge} pixels", f"{config.train.batch_size} images"


IMAGE = Modality(
    unit="images",
    position="patches",
    baseline=PIXELS,
    largest=0,
    labelled=labelled,
    unlabelled=unlabelled,
    sizes=sizes,
    collate=collate,
    seen=quarters,
    plain=plain,
    facts=facts,
)
