"""A few steps, watched for anything that makes the host wait for the device. Prints a line of JSON a scenario: the
places in the project's own code from which it was asked to."""

from __future__ import annotations

import json
import sys
import traceback
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import random_batches
from pretrain import engine, parallel
from pretrain.config import load
from pretrain.train import Trainer

ROOT = str(Path(__file__).parents[2])
WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "unique_dim",
    "_unique2",
    "allclose",
}
"""Operators whose result's value or size the host has to know."""
ON_HOST = {"draw_seed", "dropped_blocks"}  # draw from the host's generator, whatever the device


class Waits(TorchDispatchMode):
    """Whoever asks for a value; on a GPU torch itself tells (benchmarks.gpu)."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITING:
            frames = [f for f in traceback.extract_stack()[:-1] if f.filename.startswith(ROOT)]
            place = next(f for f in reversed(frames) if "/.venv/" not in f.filename).name
            if place not in ON_HOST:
                self.places.append(f"{func} from {place}")
        return func(*args, **(kwargs or {}))


def watched(path: str, overrides: list[str], world: parallel.World) -> list[str]:
    config = load(path, overrides)
    trainer = Trainer(config, world)
    first, *others = islice(random_batches(config, trainer), 3)
    trainer.step(first)  # what is allocated or moved once
    waits = Waits()
    with waits, patch.object(engine, "known_infinite", lambda norm: False):
        for batches in others:
            trainer.step(batches)
    return waits.places


def main() -> None:
    world = parallel.start()
    for line in sys.argv[1:]:
        path, *overrides = line.split()
        print(json.dumps({"scenario": line, "waits": watched(path, overrides, world)}))
    parallel.stop()


if __name__ == "__main__":
    main()
