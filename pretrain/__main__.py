"""python -m pretrain CONFIG.yaml [section.key=value ...] [--dry-run]"""

from __future__ import annotations

import sys

from pretrain.config import load
from pretrain.plan import describe
from pretrain.program import main
from pretrain.train import PreTraining

if __name__ == "__main__":
    sys.exit(main("pretrain", "Pre-train with data2vec 2.0 under DeepSpeed.", load, PreTraining, describe))
