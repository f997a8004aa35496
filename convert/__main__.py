"""python -m convert CHECKPOINT_OR_RUN OUT.safetensors"""

from __future__ import annotations

import argparse
import sys

from pretrain import full
from pretrain.checkpoint import CheckpointError
from pretrain.runtime import EXIT_BAD_INPUT
from pretrain.settings import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser("convert", description="Write a checkpoint's full weights to one file.")
    parser.add_argument("source", help="a run folder, or one of its checkpoints/step_*")
    parser.add_argument("target", help="the file to write, NAME.safetensors")
    args = parser.parse_args()
    try:
        found = full.read(args.source)
        full.write(found, args.target)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    size = sum(tensor.numel() for tensor in found.tensors.values())
    print(f"{args.target}: {len(found.tensors)} tensors, {size / 1e6:.1f} M fp32 weights after step {found.step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
