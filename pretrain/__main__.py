"""python -m pretrain CONFIG.yaml [section.key=value ...] [--dry-run]"""

from __future__ import annotations

import sys

from pretrain import program
from pretrain.baselines import describe, start
from pretrain.config import load


def main() -> int:
    return program.main("pretrain", "Pre-train with data2vec 2.0 under DeepSpeed.", load, start, describe)


if __name__ == "__main__":
    sys.exit(main())
