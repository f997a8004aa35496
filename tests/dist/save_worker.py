"""Run by test_faults.py: a checkpoint is saved in children that are killed before their first, second, ... operation on
files; after each, the newest checkpoint is loaded and compared. Prints where `latest` was after each."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from pretrain import checkpoint, parallel, pieces
from pretrain.config import load
from pretrain.data.loader import build_dataset, build_loader
from pretrain.train import Trainer

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "os.listdir"}


def killed_before(operation: int) -> None:
    """Has this process die before its `operation`-th operation on files."""
    left = [operation]

    def hook(event: str, _: tuple) -> None:
        if event in OPERATIONS:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


class Run:
    """A trainer, its states after steps 1 and 2, and a folder of checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.world = folder, parallel.start()
        self.config = load("tests/tiny.yaml", ["run.keep_last=1"])
        self.trainer = Trainer(self.config, self.world)
        self.batches = build_loader(build_dataset(self.config), self.config, self.trainer.plan, self.world, 0)
        self.states: dict[int, list[torch.Tensor]] = {}
        for step in (1, 2):
            self.train()
            self.states[step] = [values.clone() for values in self.values()]
            if step == 1:
                self.save()

    def train(self) -> None:
        self.trainer.step([next(self.batches) for _ in range(self.trainer.plan.accumulation)])

    def values(self) -> list[torch.Tensor]:
        owned = [*pieces.optimizer_pieces(self.trainer.engine), *self.trainer.teacher.pieces]
        return [piece.values for piece in owned]

    def save(self) -> None:
        trainer = self.trainer
        checkpoint.save(self.folder, trainer.engine, trainer.teacher, trainer.state, self.config, self.world)

    def load(self) -> int:
        """The step of the newest checkpoint, which has to hold the very state after that step."""
        newest = checkpoint.latest(self.folder)
        assert newest
        trainer = self.trainer
        trainer.state = checkpoint.load(newest, trainer.engine, trainer.teacher, self.world)
        for ours, expected in zip(self.values(), self.states[trainer.state.step], strict=True):
            assert torch.equal(ours, expected)
        return trainer.state.step

    def restore(self, step: int) -> None:
        for ours, expected in zip(self.values(), self.states[step], strict=True):
            ours.copy_(expected)
        self.trainer.state.step = step

    def saves(self, operation: int) -> bool:
        """Whether a child got to the end of saving step 2 before its `operation`-th operation."""
        self.restore(2)
        child = os.fork()
        if not child:
            killed_before(operation)
            self.save()
            os._exit(0)
        return os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    run = Run(Path(sys.argv[1]) / "checkpoints")
    before = Path(sys.argv[1]) / "before"
    shutil.copytree(run.folder, before)
    steps = []  # of step 2 over step 1, each time from the same folder
    while not run.saves(len(steps) + 1):
        steps.append(run.load())
        shutil.rmtree(run.folder)
        shutil.copytree(before, run.folder)
    print("new", *steps, run.load())
    steps = []  # of step 2 over step 2, each time over what the one before has left
    while not run.saves(len(steps) + 1):
        steps.append(run.load())
    print("again", *steps, run.load())
    print("left", *sorted(path.name for path in run.folder.iterdir()))
    parallel.stop()
