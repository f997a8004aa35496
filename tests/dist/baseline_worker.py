"""Run by test_baselines.py: trains baselines through the loop, whole and in two parts, of which something in the middle
of a step has ended the first."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from pretrain import parallel
from pretrain.baselines import BaselineTraining
from pretrain.config import Config, load
from pretrain.data.loader import Dataset
from pretrain.loop import run


class Killed(Exception):
    pass


class Broken(BaselineTraining):
    """Ends after seven batches: step 7 has been trained, and not saved."""

    def batches(self, dataset: Dataset, trainer: Any) -> Generator[Any, None, None]:
        for number, batch in enumerate(super().batches(dataset, trainer)):
            if number == 7 * trainer.plan.accumulation:
                raise Killed
            yield batch


if __name__ == "__main__":
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    out, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = parallel.start()

    def config(name: str, folder: str) -> Config:
        path, *overrides = jobs[name]
        return load(path, [*overrides, f"run.dir={out / folder / name}"])

    for name in jobs:
        run(BaselineTraining(config(name, "whole"), world))
        try:
            run(Broken(config(name, "killed"), world))
        except Killed:
            run(BaselineTraining(config(name, "killed"), world))
    parallel.stop()
