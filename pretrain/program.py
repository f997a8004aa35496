"""`python -m pretrain` and `python -m finetune`: arguments, ranks, exit statuses."""

from __future__ import annotations

import argparse
import errno
import faulthandler
import logging
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from pretrain import parallel
from pretrain.checkpoint import CheckpointError
from pretrain.config import Settings
from pretrain.data.sources import DataError
from pretrain.fingerprint import code, require_agreement, settings
from pretrain.loop import Diverged, Job, run
from pretrain.parallel import World
from pretrain.peers import Peers
from pretrain.runtime import EXIT_BAD_INPUT, EXIT_DIVERGED
from pretrain.settings import ConfigError, to_yaml

C = TypeVar("C", bound=Settings)


def main(
    name: str,
    description: str,
    load: Callable[[str, Sequence[str]], C],
    start: Callable[[C, World], Job],
    describe: Callable[[C, int], str],
) -> int:
    """Loads a config and runs the job that `start` makes of it; returns the exit status. `describe` says what so many
    ranks would do with it."""
    parser = argparse.ArgumentParser(name, description=description)
    parser.add_argument("config", help=f"a YAML of configs/{name}/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print config, sizes and memory, and exit")
    parser.add_argument("--ranks", type=int, default=1, help="ranks that --dry-run plans for")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_intermixed_args()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    faulthandler.enable(2)  # Python's stack for a crash in native code
    peers = Peers()
    try:
        if args.dry_run:
            config = load(args.config, args.overrides)
            costs = describe(config, args.ranks)  # first, so that an error comes alone
            print(to_yaml(config), costs, sep="\n")
            return 0
        world = parallel.start(peers=peers)  # first, so that the others learn of what this rank alone cannot read
        config = load(args.config, args.overrides)
        peers.silent = config.watch.silent_seconds
        require_agreement(peers, {"config": settings(config), "code": code()})
        status = run(start(config, parallel.split_world(world, config.train.tensor_parallel)))
    except (Exception, KeyboardInterrupt) as error:
        status = peers.fail(*told(error), lost=from_another_rank(error))
    parallel.stop()
    peers.leave()
    return status


def told(error: BaseException) -> tuple[int, str]:
    """The exit status, and what is to be said: one line about bad input, a traceback otherwise."""
    if isinstance(error, ConfigError | CheckpointError | DataError):
        return EXIT_BAD_INPUT, f"error: {error}"
    if isinstance(error, Diverged):
        return EXIT_DIVERGED, f"stopped: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EXIT_BAD_INPUT, f"error: cannot write {error.filename or 'the run folder'}: {error.strerror}"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def from_another_rank(error: BaseException) -> bool:
    """Whether it is what a collective raises when the connection to another rank breaks."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
