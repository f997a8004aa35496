"""python -m benchmarks.loader [--path DIR] [section.key=value ...]: how many images a second the data loader delivers.

Runs `build_loader` of `pretrain.data.loader` itself: reading, decoding, cropping, drawing masks, collating. Without
--path it reads photo-like JPEGs of 500 x 375 pixels and about 100 kB, made for the occasion. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.step import ROOT, hardware, rounded
from models.config import ModelConfig
from models.masks import draw_block_masks, row_keys
from pretrain.config import Config, batch_plan, load
from pretrain.data.loader import build_dataset, build_loader
from pretrain.data.sources import DataError
from pretrain.parallel import World
from pretrain.settings import ConfigError

CPU = torch.device("cpu")


def write_photos(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> float:
    """`count` JPEGs of smooth gradients under noise, about as large as ImageNet's; returns their mean bytes."""
    rng = np.random.default_rng(0)
    width, height = size
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + rng.normal(0, 18, (height, width, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04}.jpg", quality=90)
    return mean(file.stat().st_size for file in folder.iterdir())


def loading(config: Config, workers: int, seconds: float) -> dict[str, Any]:
    """Images a second with `workers` processes beside this one, from the moment that all of them deliver."""
    config = replace(config, data=replace(config.data, workers=workers))
    plan = batch_plan(config.train, ranks=1)
    batches = build_loader(build_dataset(config), config, plan, World(0, 1, CPU), first_batch=0)
    for _ in range(2 * workers + 1):  # the loader fetches two batches a worker ahead
        next(batches)
    images, start, cpu = 0, time.perf_counter(), time.process_time()
    while (wall := time.perf_counter() - start) < seconds or not images:
        images += len(next(batches).inputs)
    rate = images / wall
    figures = {"workers": workers, "images_per_s": rate, "images_per_s_per_worker": rate / max(1, workers)}
    if not workers:  # what a core needs, also if it was busy with something else meanwhile
        figures["cpu_ms_per_image"] = 1000 * (time.process_time() - cpu) / images
    return figures


def mask_ms(model: ModelConfig, images: int = 16, repeats: int = 15) -> float:
    """Milliseconds of one core for the masks of one image, drawn for `images` at a time."""
    times = []
    for i in range(repeats):
        start = time.thread_time()
        keys = row_keys(1, np.zeros(images, np.int64), np.arange(i * images, (i + 1) * images), model.num_masks)
        draw_block_masks(model.mask, keys, model.grid_shape)
        times.append(time.thread_time() - start)
    return 1000 * median(times) / images


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.loader", description="Time the data loader and its masks.")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--preset", default="image_base", help="a configuration of configs/pretrain, without .yaml")
    parser.add_argument("--path", help="images, tar shards or idx files, as data.path; without: made-up photos")
    parser.add_argument("--size", type=int, default=224, help="edge of the crops")
    parser.add_argument("--batch", type=int, default=16, help="images a batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=10, help="for each number of workers")
    parser.add_argument("--photos", type=int, default=128, help="how many to make up")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    with nullcontext() if args.path else tempfile.TemporaryDirectory() as made:
        image_bytes = write_photos(Path(made), args.photos) if made else None
        ours = [f"model.image.size={args.size}", f"data.path={args.path or made}", f"train.batch_size={args.batch}"]
        try:
            config = load(ROOT / "configs" / "pretrain" / f"{args.preset}.yaml", ours + args.overrides)
            runs = [loading(config, workers, args.seconds) for workers in args.workers]
        except (ConfigError, DataError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    masks = mask_ms(config.model)
    figures = {
        "command": shlex.join(["python", "-m", "benchmarks.loader", *sys.argv[1:]]),
        "preset": args.preset,
        "size": config.model.image.size,
        "image_bytes": image_bytes,
        "loading": runs,
        "mask_ms_per_image": masks,
        "num_masks": config.model.num_masks,
        "hardware": hardware(CPU),
    }
    if alone := [run["cpu_ms_per_image"] for run in runs if not run["workers"]]:
        figures["mask_share"] = masks / alone[0]
    for run in runs:
        print(f"{run['workers']} workers: {run['images_per_s']:8.1f} images/s", file=sys.stderr)
    print(f"masks: {masks:.3f} ms an image, share {figures.get('mask_share', float('nan')):.1%}", file=sys.stderr)
    print(json.dumps(rounded(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
