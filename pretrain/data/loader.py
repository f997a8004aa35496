"""From a config to an endless stream of micro-batches."""

from __future__ import annotations

import signal
from collections.abc import Generator

import torch
from torch.utils.data import DataLoader

from models.data2vec import Batch
from pretrain.config import BatchPlan, Config
from pretrain.data.collate import Collate
from pretrain.data.fetch import resolve
from pretrain.data.image import ImageDataset
from pretrain.data.sampler import StreamSampler
from pretrain.data.sources import DataError, open_images
from pretrain.parallel import World
from pretrain.runtime import STOP_SIGNALS


def build_dataset(config: Config) -> ImageDataset:
    """The training samples of the config's modality; raises DataError with one clear line."""
    data, image = config.data, config.model.image
    return ImageDataset(
        open_images(resolve(data.path), data.split),
        size=image.size,
        seed=config.train.seed,
        crop_scale=data.image.crop_scale,
        crop_ratio=data.image.crop_ratio,
        flip=data.image.flip,
        channels=image.channels,
        max_pixels=data.image.max_pixels,
    )


def build_loader(
    dataset: ImageDataset, config: Config, plan: BatchPlan, world: World, first_batch: int
) -> Generator[Batch, None, None]:
    """Micro-batches of this rank from global batch `first_batch` on, on the host (pinned if there is a GPU).

    Iterating raises DataError, in one line, for data that cannot be read. Close it to end its workers.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=StreamSampler(len(dataset), plan, world.rank, config.train.seed, first_batch),
        collate_fn=Collate(config.model, config.train.seed),
        num_workers=config.data.workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_prepare_worker,
    )
    batches = iter(loader)
    try:
        yield from batches
    except DataError as error:  # a worker's comes with its traceback as text, the message last
        raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None
    finally:
        if config.data.workers:  # which ignore the SIGTERM that would end them at the interpreter's exit
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in STOP_SIGNALS:  # schedulers signal whole process groups; the main process decides when to stop
        signal.signal(number, signal.SIG_IGN)
