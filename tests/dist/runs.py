"""Several runs in turn in one launch: python -m tests.dist.runs pretrain|finetune "CONFIG section.key=value ..." ..."""

from __future__ import annotations

import logging
import shlex
import sys
from importlib import import_module

from pretrain import parallel
from pretrain.loop import run


def main(program: str, *runs: str) -> int:
    """Those with tensor parallelism last, of one number of ranks, for groups stay split. The first failure's status."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    entry = import_module(f"{program}.__main__")
    world, status = parallel.start(), 0
    for path, *overrides in sorted(map(shlex.split, runs), key=splits):
        config = entry.load(path, overrides)  # which may look at the run before
        if config.train.tensor_parallel != world.tensor_ranks:
            world = parallel.split_world(world, config.train.tensor_parallel)
        status = status or run(entry.start(config, world))
    parallel.stop()
    return status


def splits(words: list[str]) -> bool:
    return any(word.startswith("train.tensor_parallel=") and not word.endswith("=1") for word in words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
