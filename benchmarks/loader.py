"""python -m benchmarks.loader [--formats jpeg flac_16000 ...] [section.key=value ...]: what loading costs, by format.

Runs `build_loader` of `pretrain.data.loader` itself (reading, decoding, cropping, drawing masks, collating) on made-up
data, or on what lies at --path. Prints one line of JSON a format to stdout, and a table for people to stderr.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import made_up
from benchmarks.plan import Cluster
from benchmarks.step import ROOT, hardware, rounded
from models.config import RATE, ModelConfig
from models.masks import draw_block_masks, row_keys
from pretrain.config import Config, batch_plan, load
from pretrain.data.collate import Collate
from pretrain.data.loader import build_dataset, build_loader, load_batches
from pretrain.data.sources import DataError, Sample
from pretrain.parallel import World
from pretrain.plan import samples, useful_work
from pretrain.settings import ConfigError

CPU = torch.device("cpu")
HERE = World(0, 1, CPU)
SHARES = {
    "image": {"image_base": 0.35, "image_large": 0.45, "image_huge14": 0.45},
    "audio": {"audio_large": 0.4},
    "text": {"text_large": 0.4},
}
"""By modality and preset: which share of its datasheet rate one GPU is to spend on useful matrix work."""
BATCHES = {"image": 16, "audio": 1, "text": 2}  # samples a GPU in the presets' cards
ROUNDS = 5


class Format(NamedTuple):
    modality: str
    write: Callable[..., None]
    """Makes so many samples in a folder."""
    files: int = 64


OTHER_RATES = {"wav": 44_100, "flac": 44_100, "ogg": 44_100, "mp3": 44_100, "opus": 48_000}
FORMATS = {
    "jpeg": Format("image", made_up.write_jpegs),
    "jpeg_large": Format("image", partial(made_up.write_jpegs, size=made_up.LARGE_PHOTO), 16),
    "tar": Format("image", made_up.write_tar),
    "idx": Format("image", made_up.write_idx),
    **{
        f"{kind}_{rate}": Format("audio", partial(made_up.write_recordings, kind=kind, rate=rate), 4)
        for kind, other in OTHER_RATES.items()
        for rate in (RATE, other)
    },
    "corpus": Format("text", lambda folder, blocks: made_up.write_corpus(folder / "made_up", 512 * blocks), 4096),
}


@dataclass
class Ready(torch.utils.data.Dataset):
    """Samples that cost nothing to read, so that what is left is collating and handing over."""

    inputs: Tensor

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.inputs, 0, index)


def processor_seconds(batches: Iterator[Any], number: int) -> tuple[float, float]:
    """Of this process and of all together, the loader's workers included, for the next `number` batches."""
    # Linux has a clock for every process, whose number is made so of its id (clock_getcpuclockid).
    clocks = [(~process.pid << 3) | 2 for process in multiprocessing.active_children() if process.pid]

    def now() -> tuple[float, float]:
        own = time.process_time()
        return own, own + sum(time.clock_gettime(clock) for clock in clocks)

    start = now()
    for _ in range(number):
        next(batches)
    end = now()
    return end[0] - start[0], end[1] - start[1]


def hand_over(config: Config, inputs: Tensor, size: int, seconds: float) -> tuple[float, float]:
    """Milliseconds of processor a sample that a worker between costs, in all and in the main process.

    Batches of `size` samples that are there already, with a worker against without, taken in turn.
    """

    def loaded(workers: int) -> Iterator[Any]:
        keys = (list(range(first, first + size)) for first in count(0, size))
        return load_batches(Ready(inputs), keys, Collate(config.model, config.train.seed), workers, HERE)

    totals: list[tuple[float, float]] = []
    number = 20
    while len(totals) < ROUNDS:
        alone = loaded(0)
        next(alone)
        start = time.perf_counter()
        without, _ = processor_seconds(alone, number)
        if not totals and (took := time.perf_counter() - start) < seconds / ROUNDS / 4:
            number = max(number, min(1000, int(number * seconds / ROUNDS / 4 / took)))
            without, _ = processor_seconds(alone, number)
        beside = loaded(1)
        for _ in range(4):  # the loader fetches two batches ahead, and memory is used again from then on
            next(beside)
        main, both = processor_seconds(beside, number)
        beside.close()  # type: ignore[attr-defined]
        totals.append((both - without, main))
    return tuple(1000 * median(each) / number / size for each in zip(*totals, strict=True))  # type: ignore[return-value]


def alone(config: Config, dataset: Any, seconds: float) -> float:
    """Milliseconds of processor a sample without workers, masks and collating included."""
    batches = build_loader(dataset, config, batch_plan(config.train, ranks=1), HERE, first_batch=0)
    next(batches)
    seen, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds or not seen:
        seen += len(next(batches).inputs)
    return 1000 * (time.process_time() - cpu) / seen


def delivered(config: Config, dataset: Any, workers: int, seconds: float) -> float:
    """Samples a second with `workers` processes beside this one, from the moment that all of them deliver."""
    config = replace(config, data=replace(config.data, workers=workers))
    batches = build_loader(dataset, config, batch_plan(config.train, ranks=1), HERE, first_batch=0)
    for _ in range(2 * workers + 1):
        next(batches)
    seen, start = 0, time.perf_counter()
    while (wall := time.perf_counter() - start) < seconds or not seen:
        seen += len(next(batches).inputs)
    batches.close()
    return seen / wall


def mask_ms(model: ModelConfig, size: int, repeats: int = 15) -> float:
    """Milliseconds of one core for the masks of one sample, drawn for `size` at a time."""
    times = []
    for i in range(repeats):
        start = time.thread_time()
        keys = row_keys(1, np.zeros(size, np.int64), np.arange(i * size, (i + 1) * size), model.num_masks)
        draw_block_masks(model.mask, keys, model.grid_shape)
        times.append(time.thread_time() - start)
    return 1000 * median(times) / size


def consumed(modality: str) -> dict[str, float]:
    """By preset, the samples a second that one GPU takes at the share of SHARES."""
    works = {preset: useful_work(load(_preset(preset), []).model).total for preset in SHARES[modality]}
    return {preset: SHARES[modality][preset] * Cluster.flops / work for preset, work in works.items()}


def measure(config: Config, workers: list[int], seconds: float) -> dict[str, Any]:
    """The figures of one format."""
    model, dataset = config.model, build_dataset(config, progress=False)
    size = samples(model, config.train.batch_size)
    inputs = next(build_loader(dataset, config, batch_plan(config.train, ranks=1), HERE, 0)).inputs[0]
    cpu, masks = alone(config, dataset, seconds), mask_ms(model, size)
    over, main = hand_over(config, inputs, size, seconds)
    total = cpu + over
    rates = {
        "image": {"images_per_s_per_core": 1000 / total},
        "audio": {"audio_hours_per_s_per_core": model.audio.seconds / 3600 * 1000 / total},
        "text": {"tokens_per_s_per_core": model.text.tokens * 1000 / total},
    }
    return {
        "modality": model.modality,
        "batch": size,
        "cpu_ms": total,
        "samples_per_s_per_core": 1000 / total,
        **rates[model.modality],
        "mask_ms": masks,
        "mask_share": masks / total,
        "hand_over_ms": over,
        "hand_over_share": over / total,
        "hand_over_main_ms": main,
        "consumed_per_s": (need := consumed(model.modality)),
        "cores_needed": {preset: rate * total / 1000 for preset, rate in need.items()},
        "loading": [{"workers": n, "samples_per_s": delivered(config, dataset, n, seconds)} for n in workers],
    }


def _preset(name: str) -> Path:
    return ROOT / "configs" / "pretrain" / f"{name}.yaml"


def configured(path: Path, preset: str, batch: int | None, overrides: list[str]) -> Config:
    config = load(_preset(preset), [f"data.path={path}", *overrides])
    size = (batch or BATCHES[config.model.modality]) * config.model.sample_size
    sizes = [f"train.batch_size={size}", f"train.micro_batch={size}", "data.workers=0"]
    return load(_preset(preset), [f"data.path={path}", *sizes, *overrides])


def table_row(name: str, found: dict[str, Any]) -> str:
    cores = ", ".join(f"{preset} {cores:.2f}" for preset, cores in found["cores_needed"].items())
    rates = ", ".join(f"{run['workers']}: {run['samples_per_s']:.1f}" for run in found["loading"])
    return (
        f"{name:11} {found['cpu_ms']:8.3f} {found['samples_per_s_per_core']:9.1f} {found['mask_share']:7.1%} "
        f"{found['hand_over_share']:10.1%} {found['hand_over_main_ms']:9.3f}   {cores}; {rates}"
    )


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.loader", description="Time the data loader, its masks and workers.")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all")
    parser.add_argument(
        "--preset", help="a configuration of configs/pretrain, without .yaml, for its modality's formats"
    )
    parser.add_argument("--path", help="as data.path, instead of made-up data; goes with --preset")
    parser.add_argument("--batch", type=int, help="samples a batch (images 16, clips 1, blocks of text 2)")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="also deliver with so many (1 2)")
    parser.add_argument("--seconds", type=float, default=5, help="for each figure")
    parser.add_argument("--files", type=int, help="how many samples to make up")
    args = parser.parse_intermixed_args()
    if args.path and not args.preset:
        parser.error("--path needs --preset, which says how to read it")
    torch.set_num_threads(1)
    print(
        f"{'format':11} {'cpu ms':>8} {'/s a core':>9} {'masks':>7} {'hand-over':>10} {'its main':>9}   ",
        end="",
        file=sys.stderr,
    )
    print("cores a GPU needs; delivered/s with so many workers", file=sys.stderr)
    for name in ["path"] if args.path else args.formats:
        preset = args.preset or next(iter(SHARES[FORMATS[name].modality]))
        with tempfile.TemporaryDirectory() as folder:
            try:
                config = configured(Path(args.path or folder), preset, args.batch, args.overrides)
                if not args.path:
                    if FORMATS[name].modality != config.model.modality:
                        continue
                    FORMATS[name].write(Path(folder), args.files or FORMATS[name].files)
                found = measure(config, args.workers, args.seconds)
            except (ConfigError, DataError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
        command = shlex.join(["python", "-m", "benchmarks.loader", *sys.argv[1:]])
        print(table_row(name, found), file=sys.stderr)
        whole = {"format": name, "preset": preset, "command": command, **found, "hardware": hardware(CPU)}
        print(json.dumps(rounded(whole)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
