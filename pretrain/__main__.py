"""python -m pretrain CONFIG.yaml [section.key=value ...] [--dry-run]"""

from __future__ import annotations

import sys

from pretrain import program
from pretrain.config import load
from pretrain.plan import describe
from pretrain.train import PreTraining


def main() -> int:
    return program.main("pretrain", "Pre-train with data2vec 2.0 under DeepSpeed.", load, PreTraining, describe)


if __name__ == "__main__":
    sys.exit(main())
