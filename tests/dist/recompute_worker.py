"""Trains a few steps with each of the given settings, in one process. Prints a line of JSON for each: losses, a digest
of the weights, and the bytes that a forward pass keeps for its backward pass."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from itertools import islice

import torch
from torch import Tensor

from benchmarks.step import random_batches
from pretrain import parallel
from pretrain.config import load
from pretrain.train import Trainer

STEPS = 3


def trained(path: str, overrides: list[str], world: parallel.World) -> dict[str, object]:
    config = load(path, overrides)
    trainer = Trainer(config, world)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    steps = list(islice(random_batches(config, trainer), STEPS + 1))
    losses = [float(trainer.step(batches)[0].loss) for batches in steps[1:]]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = trainer.engine(steps[0][0], 0)  # what is kept lives as long as this does
    assert output.regression.requires_grad
    digest = sha256()
    for piece in trainer.teacher.pieces:
        digest.update(piece.values.contiguous().numpy().tobytes())
    return {"losses": losses, "weights": digest.hexdigest(), "kept": sum(kept.values())}


def main() -> None:
    world = parallel.start()
    for line in sys.argv[1:]:
        path, *overrides = line.split()
        print(json.dumps({"scenario": line} | trained(path, overrides, world)))
    parallel.stop()


if __name__ == "__main__":
    main()
