"""python -m pretrain CONFIG.yaml [section.key=value ...] [--dry-run]"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from pretrain import parallel
from pretrain.checkpoint import CheckpointError
from pretrain.config import ConfigError, load, to_yaml
from pretrain.data.sources import DataError
from pretrain.plan import describe
from pretrain.runtime import EXIT_BAD_INPUT, EXIT_DIVERGED
from pretrain.train import Diverged, train


def main() -> int:
    parser = argparse.ArgumentParser("pretrain", description="Pre-train with data2vec 2.0 under DeepSpeed.")
    parser.add_argument("config", help="a YAML of configs/pretrain/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print config, sizes and memory, and exit")
    parser.add_argument("--ranks", type=int, default=1, help="ranks that --dry-run plans for")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_intermixed_args()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        config = load(args.config, args.overrides)
        if args.dry_run:
            costs = describe(config, args.ranks)  # first, so that an error comes alone
            print(to_yaml(config), costs, sep="\n")
            return 0
        return train(config, parallel.start(config.train.tensor_parallel))
    except (ConfigError, CheckpointError) as error:
        say(f"error: {error}")
        return EXIT_BAD_INPUT
    except DataError as error:  # of this rank alone, perhaps
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except Diverged as error:
        say(f"stopped: {error}")
        return EXIT_DIVERGED
    finally:
        parallel.stop()


def say(line: str) -> None:
    """What all ranks have to say, once."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
