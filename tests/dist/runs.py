"""Several runs in turn in one launch: python -m tests.dist.runs pretrain|finetune "CONFIG section.key=value ..." ..."""

from __future__ import annotations

import logging
import shlex
import sys
from importlib import import_module

from pretrain import parallel
from pretrain.loop import run
from pretrain.settings import read_tree


def main(program: str, *runs: str) -> int:
    """Those with tensor parallelism last, of one number of ranks, for groups stay split. The first failure's status."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    entry = import_module(f"{program}.__main__")
    world, status = parallel.start(), 0
    for path, *overrides in sorted(map(shlex.split, runs), key=tensor_parallel):
        config = entry.load(path, overrides)  # which may look at the run before
        if config.train.tensor_parallel != world.tensor_ranks:
            world = parallel.split_world(world, config.train.tensor_parallel)
        if status := run(entry.start(config, world)):
            break
    parallel.stop()
    return status


def tensor_parallel(words: list[str]) -> int:
    path, *overrides = words
    return int(read_tree(path, overrides).get("train", {}).get("tensor_parallel", 1))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
