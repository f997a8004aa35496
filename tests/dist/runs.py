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
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    world = parallel.start()
    statuses = []
    for line in sys.argv[1:]:
        path, *overrides = shlex.split(line)
        config = load(path, overrides)
        statuses.append(run(start(config, parallel.split_world(world, config.train.tensor_parallel))))
    parallel.stop()
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
