"""Image classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune import augment
from finetune.config import Config
from finetune.task import Examples, Some, Split, Task
from pretrain.data.fetch import resolve
from pretrain.data.image import ImageDataset
from pretrain.data.sources import DataError, ImageSource, Sample, open_images
from pretrain.labelled.samples import Labels, renumbered

LEFT_OUT = -100  # the class of what takes no part in the loss
TOP = 5


class ImageTask(Task):
    """Learns from random crops, augmented, is evaluated on centre crops; the best checkpoint has the most of them
    right."""

    largest = 0

    def __init__(self, config: Config, progress: bool) -> None:
        super().__init__(config, progress)
        path = resolve(config.data.path)
        source = _labelled(path, config.data.split)
        self.labels = source.classes
        images, classes = self._open(source, train=True)
        self.train = Split(Some.drawn(images, classes, config), classes)
        self.evaluated = {split: self._open(_labelled(path, split), train=False) for split in config.eval.splits}

    def _open(self, source: ImageSource, train: bool) -> Split:
        config = self.config
        image, data = config.model.image, config.data
        images = ImageDataset(
            source,
            size=image.size,
            seed=config.train.seed,
            crop_scale=data.image.crop_scale,
            crop_ratio=data.image.crop_ratio,
            flip=data.image.flip,
            channels=image.channels,
            max_pixels=data.image.max_pixels,
            draft=data.image.draft,
            train=train,
            centre=config.image.crop_share,
        )
        assert source.labels is not None
        return Split(images, renumbered(source.labels, source.classes, self.labels))

    def collate(self, references: Labels, samples: Sequence[Sample]) -> Examples:
        """-> (B, C, H, W) uint8 and (B,) classes; of what another image stands in for the class is LEFT_OUT."""
        failures = tuple(failure for sample in samples for failure in sample.failures)
        classes = [LEFT_OUT if sample.failures else int(references[sample.index]) for sample in samples]
        inputs = torch.stack([sample.inputs for sample in samples])
        count = sum(c != LEFT_OUT for c in classes)
        return Examples(inputs, torch.tensor(classes), count, failures=failures)

    def augment(self, examples: Examples) -> Examples:
        """uint8 images and classes -> what RandAugment, erasing and mixing make of them, normalised if it is one of the
        latter; and (B, K) shares of classes if these are mixed or smoothed."""
        config, image = self.config.image, self.config.model.image
        pixels, targets = examples.inputs, examples.targets
        mean, std = (255 * torch.tensor(v).to(pixels.device, non_blocking=True) for v in (image.mean, image.std))
        if config.operations:
            pixels = augment.rand_augment(pixels, config, mean.round())
        mixes = bool(config.mixup or config.cutmix)
        if config.erase or mixes:
            pixels = (pixels - mean[:, None, None]) / std[:, None, None]
        if config.erase:
            pixels = augment.erase(pixels, config)
        if config.smoothing or mixes:
            targets = shares(targets, len(self.labels), config.smoothing)
        if mixes:
            pixels, targets = augment.mix(pixels, targets, config)
        return replace(examples, inputs=pixels, targets=targets)

    def loss(self, outputs: Tensor, examples: Examples) -> Tensor:
        return F.cross_entropy(outputs.float(), examples.targets, reduction="sum", ignore_index=LEFT_OUT)

    def predict(self, outputs: Tensor, examples: Examples) -> list[Any]:
        """The likeliest classes, at most TOP of them."""
        likeliest = outputs.topk(min(TOP, outputs.shape[1])).indices.tolist()
        genuine = (examples.targets != LEFT_OUT).tolist()
        return [classes if own else None for classes, own in zip(likeliest, genuine, strict=True)]

    def judge(self, split: str, indices: list[int], predictions: list[Any]) -> dict[str, float]:
        right = np.array(predictions) == self.evaluated[split].references[indices, None]
        return {"accuracy": float(right[:, 0].mean()), f"top{right.shape[1]}": float(right.any(axis=1).mean())}

    def best(self, figures: dict[str, float]) -> float:
        return figures["accuracy"]


def shares(classes: Tensor, count: int, smoothing: float) -> Tensor:
    """(B,) -> (B, count): 1 for a sample's class, of which `smoothing` goes evenly to all; zeros for LEFT_OUT."""
    own = (classes[:, None] == torch.arange(count, device=classes.device)).float()
    return torch.where(classes[:, None] == LEFT_OUT, 0.0, torch.lerp(own, torch.full_like(own, 1 / count), smoothing))


def _labelled(path: str, split: str) -> ImageSource:
    source = open_images(path, split)
    if source.labels is None:
        raise DataError(f"the {split} images of {path} have no labels: give class folders, or idx files with labels")
    return source
