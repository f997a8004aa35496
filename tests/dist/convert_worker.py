"""Run by test_convert.py under torchrun: trains, saves, and writes the model's own parameters down."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from deepspeed.runtime.zero import GatheredParameters

from pretrain import checkpoint, parallel
from pretrain.config import load
from pretrain.data.loader import build_dataset, build_loader
from pretrain.train import Trainer


def main(folder: Path, *overrides: str) -> None:
    config, world = load("tests/tiny.yaml", overrides), parallel.start()
    trainer = Trainer(config, world)
    batches = build_loader(build_dataset(config), config, trainer.plan, world, 0)
    for _ in range(3):
        trainer.step([next(batches)])
    checkpoint.save(folder / "checkpoints", trainer.engine, trainer.teacher, trainer.state, config, world)
    parameters = dict(trainer.model.named_parameters())
    with GatheredParameters(list(parameters.values())):
        if world.is_main:
            torch.save({name: p.detach().clone() for name, p in parameters.items()}, folder / "parameters.pt")
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
