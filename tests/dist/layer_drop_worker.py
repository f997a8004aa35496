"""Run by test_modalities.py under two ranks: which blocks each micro-step runs, and what its dropout is seeded with."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch

from pretrain import parallel
from pretrain.config import load
from pretrain.data.loader import build_dataset, build_loader
from pretrain.train import Trainer

if __name__ == "__main__":
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    path, out = sys.argv[1:]
    world = parallel.start()
    config = load("tests/tiny_audio.yaml", [f"data.path={path}"])
    trainer = Trainer(config, world)
    batches = build_loader(build_dataset(config), config, trainer.plan, world, 0)
    steps: list[list[int]] = []
    seeds: list[int] = []

    def begin(*_: object) -> None:
        steps.append([])
        seeds.append(torch.initial_seed())

    trainer.model.student.register_forward_pre_hook(begin)
    for i, block in enumerate(trainer.model.student.blocks):
        block.register_forward_hook(lambda *_, i=i: steps[-1].append(i))
    for _ in range(4):
        trainer.step([next(batches) for _ in range(trainer.plan.accumulation)])
    (Path(out) / f"rank{world.rank}.json").write_text(json.dumps({"blocks": steps, "seeds": seeds}))
    parallel.stop()
