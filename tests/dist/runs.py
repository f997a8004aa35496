"""Pre-trains several runs in turn in one launch: python -m tests.dist.runs "CONFIG section.key=value ..." ..."""

from __future__ import annotations

import logging
import shlex
import sys

from pretrain import parallel
from pretrain.baselines import start
from pretrain.config import load
from pretrain.loop import run


def main() -> int:
    """Those with tensor parallelism last, of one number of ranks, for groups stay split. The first failure's status."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    configs = [load(path, overrides) for path, *overrides in map(shlex.split, sys.argv[1:])]
    world, status = parallel.start(), 0
    for config in sorted(configs, key=lambda config: config.train.tensor_parallel):
        if config.train.tensor_parallel != world.tensor_ranks:
            world = parallel.split_world(world, config.train.tensor_parallel)
        status = status or run(start(config, world))
    parallel.stop()
    return status


if __name__ == "__main__":
    sys.exit(main())
