"""From a config to an endless stream of micro-batches."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import torch
from torch.utils.data import DataLoader

from models.data2vec import Batch
from models.movable import Movable
from pretrain.config import BatchPlan, Config
from pretrain.data.audio import AudioDataset
from pretrain.data.collate import COLLATES
from pretrain.data.corpus import open_corpus
from pretrain.data.fetch import resolve
from pretrain.data.handover import Packing, Parcel, forget
from pretrain.data.image import ImageDataset
from pretrain.data.packs import PackSampler
from pretrain.data.recordings import open_audio
from pretrain.data.sampler import StreamSampler
from pretrain.data.sources import DataError, Sample, in_one_line, open_images
from pretrain.data.text import TextDataset
from pretrain.parallel import World
from pretrain.runtime import STOP_SIGNALS


class Dataset(Protocol):
    """Samples by key; which keys make up a micro-batch is the sampler's business."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the data, in sentences."""

    @property
    def assets(self) -> tuple[Path, ...]:
        """Files that the samples mean nothing without; the run folder keeps copies."""

    def fingerprint(self) -> str:
        """Tells these samples from others by what is in memory of them, wherever they lie."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> Sample: ...


def open_image_data(config: Config, path: str, progress: bool) -> ImageDataset:
    data, image = config.data, config.model.image
    return ImageDataset(
        open_images(path, data.split),
        size=image.size,
        seed=config.train.seed,
        crop_scale=data.image.crop_scale,
        crop_ratio=data.image.crop_ratio,
        flip=data.image.flip,
        channels=image.channels,
        max_pixels=data.image.max_pixels,
        draft=data.image.draft,
    )


def open_audio_data(config: Config, path: str, progress: bool) -> AudioDataset:
    seconds = config.data.audio.min_seconds, config.model.audio.seconds
    source = open_audio(path, config.data.split, progress=progress)
    return AudioDataset(source, seed=config.train.seed, min_seconds=seconds[0], max_seconds=seconds[1])


def open_text_data(config: Config, path: str, progress: bool) -> TextDataset:
    corpus, text = open_corpus(path, config.data.split), config.model.text
    if corpus.meta.vocabulary != text.vocabulary or corpus.meta.pad != text.pad:
        raise DataError(
            f"the corpus {path} was made with a tokenizer of {corpus.meta.vocabulary} ids, padding "
            f"{corpus.meta.pad}; set model.text.vocabulary={corpus.meta.vocabulary} model.text.pad={corpus.meta.pad} "
            f"(now {text.vocabulary} and {text.pad}), or tokenise with another"
        )
    return TextDataset(corpus, tokens=text.tokens)


OPENERS: dict[str, Callable[[Config, str, bool], Dataset]] = {
    "image": open_image_data,
    "audio": open_audio_data,
    "text": open_text_data,
}


def build_dataset(config: Config, progress: bool = True) -> Dataset:
    """The training samples of the config's modality; raises DataError with one clear line. `progress`: shows it."""
    if not config.data.path:
        raise DataError("data.path is not given: where do the samples lie? (a path, or fetch:NAME)")
    return OPENERS[config.model.modality](config, resolve(config.data.path), progress)


def build_sampler(dataset: Dataset, config: Config, plan: BatchPlan, rank: int, first_batch: int) -> Any:
    """What yields lists of keys: clips of like length where samples differ in length, a plain shuffle elsewhere."""
    seed = config.train.seed
    if isinstance(dataset, AudioDataset):
        audio = config.data.audio
        return PackSampler(dataset.lengths, plan, rank, seed, first_batch, audio.pool, multiple=audio.multiple)
    return StreamSampler(len(dataset), plan, rank, seed, first_batch)


def build_loader(
    dataset: Dataset, config: Config, plan: BatchPlan, world: World, first_batch: int
) -> Generator[Batch, None, None]:
    """Micro-batches of this rank from global batch `first_batch` on, on its device; see `load_batches`."""
    sampler = build_sampler(dataset, config, plan, world.data_rank, first_batch)
    collate = COLLATES[config.model.objective](config.model, config.train.seed)
    return on_device(load_batches(dataset, sampler, collate, config.data.workers, world), world.device)


B = TypeVar("B")
M = TypeVar("M", bound=Movable)


def load_batches(
    dataset: Any, keys: Any, collate: Callable[[Sequence[Any]], B], workers: int, world: World
) -> Generator[B, None, None]:
    """What `collate` makes of the samples of each list of `keys`, on the host (pinned if there is a GPU).

    Iterating raises DataError, in one line, for data that cannot be read. Close it to end its workers.
    """
    name = uuid4().hex
    loader: DataLoader[B | Parcel] = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=Packing(collate, name) if workers else collate,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_prepare_worker,
    )
    batches: Iterator[B | Parcel] = iter(loader)
    try:
        for batch in batches:
            yield batch.open() if isinstance(batch, Parcel) else batch
    except DataError as error:
        raise in_one_line(error) from None
    finally:
        if workers:  # which ignore the SIGTERM that would end them at the interpreter's exit
            batches._shutdown_workers()  # type: ignore[attr-defined]
            forget(name)


def on_device(batches: Generator[M, None, None], device: torch.device) -> Generator[M, None, None]:
    """Copies to a GPU go on beside what has been asked of it before: the host, which waits for no step, is ahead."""
    with closing(batches):
        if device.type != "cuda":
            yield from batches
            return
        copies, computation = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        for batch in batches:
            with torch.cuda.stream(copies):
                moved = batch.to(device)
            computation.wait_stream(copies)
            yield moved.used_by(computation)


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in STOP_SIGNALS:  # schedulers signal whole process groups; the main process decides when to stop
        signal.signal(number, signal.SIG_IGN)
