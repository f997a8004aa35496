"""Run by test_fused_adam.py: STEPS steps with each Adam at each ZeRO stage, and what lies behind STOP once more, from
the checkpoint. Saves into FOLDER/STAGE-ADAM and FOLDER/STAGE-ADAM-continued, and prints a line of JSON an Adam: who has
to know a value in two steps at stage 1."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.step import random_batches
from models.fused import kernels
from pretrain import checkpoint, parallel
from pretrain.config import Config, load
from pretrain.train import Trainer
from tests.dist.lean_worker import watched
from tests.fused_adam import install

STAGES, CONTINUED, STEPS, STOP = (0, 1, 3), (0, 1), 3, 1
SEVERAL = {"sub_group_size": 1000}  # pieces of a group, of which stage 3 steps one at a time
COMMON = ["optim.clip_norm=0.05", "optim.warmup_steps=0", f"train.steps={STEPS}"]  # norms are about 1


def train(config: Config, folder: Path, world: parallel.World, source: Path | None = None) -> None:
    """To the end, from the step that `source` holds, or from the first, which is saved on the way."""
    trainer = Trainer(config, world)
    if source:
        trainer.state = checkpoint.load(source, trainer.engine, trainer.teacher, world)
    batches = list(islice(random_batches(config, trainer), STEPS))[trainer.state.step :]
    for batch in batches:
        _, result = trainer.step(batch)
        assert result.grad_norm > 2 * config.optim.clip_norm
        if trainer.state.step in (STOP, STEPS):
            checkpoint.save(
                folder / "checkpoints", trainer.engine, trainer.teacher, trainer.state, trainer.config, world
            )
    trainer.engine.destroy()


def main() -> None:
    folder, patch = Path(sys.argv[1]), pytest.MonkeyPatch()
    install(patch)
    patch.setattr(kernels, "problems", lambda *_: [])  # that there is no GPU
    world = parallel.start()
    for stage in STAGES:
        mechanics = folder / f"zero{stage}.json"
        mechanics.write_text(json.dumps({"zero_optimization": {"stage": stage} | SEVERAL}))
        for adam in ("torch", "apex", "deepspeed"):
            asked = [*COMMON, f"train.deepspeed={mechanics}", f"train.kernels.adam={adam}"]
            config, whole = load("tests/tiny.yaml", asked), folder / f"{stage}-{adam}"
            train(config, whole, world)
            if adam != "torch" and stage in CONTINUED:
                stopped = whole / "checkpoints" / f"step_{STOP:08d}"
                train(config, folder / f"{stage}-{adam}-continued", world, stopped)
    lean = ["train.deepspeed=ds_configs/zero1.json", "train.precision=bf16"]
    for adam in ("apex", "deepspeed"):
        waits = watched("tests/tiny.yaml", [*lean, f"train.kernels.adam={adam}"], world)
        print(json.dumps({"adam": adam, "waits": waits}))
    parallel.stop()


if __name__ == "__main__":
    main()
