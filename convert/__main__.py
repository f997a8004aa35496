"""python -m convert CHECKPOINT_OR_RUN OUT.safetensors"""

from __future__ import annotations

import argparse
import sys

from convert.full import export
from pretrain.checkpoint import CheckpointError
from pretrain.config import ConfigError
from pretrain.runtime import EXIT_BAD_INPUT


def main() -> int:
    parser = argparse.ArgumentParser("convert", description="Write a checkpoint's full weights to one file.")
    parser.add_argument("source", help="a run folder, or one of its checkpoints/step_*")
    parser.add_argument("target", help="the file to write, NAME.safetensors")
    args = parser.parse_args()
    try:
        print(export(args.source, args.target))
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
