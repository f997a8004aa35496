"""From a config to an endless stream of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from models.data2vec import Batch
from pretrain.config import BatchPlan, Config
from pretrain.data.collate import Collate, Sample
from pretrain.data.fetch import resolve
from pretrain.data.image import ImageDataset
from pretrain.data.sampler import StreamSampler
from pretrain.data.sources import open_images
from pretrain.parallel import World


def build_dataset(config: Config) -> Dataset[Sample]:
    """The training samples of the config's modality; raises DataError with one clear line."""
    data, image = config.data, config.model.image
    return ImageDataset(
        open_images(resolve(data.path), data.split),
        size=image.size,
        seed=config.train.seed,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        flip=data.flip,
        channels=image.channels,
        max_pixels=data.max_pixels,
    )


def build_loader(config: Config, plan: BatchPlan, world: World, first_batch: int) -> Iterator[Batch]:
    """Micro-batches of this rank from global batch `first_batch` on, on the host (pinned if there is a GPU)."""
    dataset = build_dataset(config)
    workers = config.data.workers
    loader = DataLoader(
        dataset,
        batch_sampler=StreamSampler(len(dataset), plan, world.rank, config.train.seed, first_batch),  # type: ignore[arg-type]
        collate_fn=Collate(config.model, config.train.seed),
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_one_thread,
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
