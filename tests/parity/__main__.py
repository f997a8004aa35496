"""python -m tests.parity DIR [--zero 0|1|2]: how far this program is from the authors' own numbers.

DIR holds golden cases, <case>.json and <case>.safetensors; tests/parity/golden has those of set A. Exit status 1 if any
bound is exceeded.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from pretrain import parallel
from tests.parity.replay import cases, replay


def main() -> int:
    parser = argparse.ArgumentParser("tests.parity", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2), default=1)
    args = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    found = cases(args.folder)
    if not found:
        print(f"error: {args.folder} holds no case (a .json beside a .safetensors of the same name)", file=sys.stderr)
        return 2
    world = parallel.start()
    failed = 0
    for path in found:
        for row in replay(path, args.zero, world):
            failed += not row.ok
            verdict = "ok" if row.ok else "EXCEEDED"
            print(
                f"{path.stem:16} {row.quantity:28} error {row.error:8.1e}  bound {row.bound:.0e}  {verdict}", flush=True
            )
    print(
        f"{len(found)} cases replayed at ZeRO {args.zero}: "
        + (f"{failed} bounds exceeded" if failed else "all within bounds")
    )
    parallel.stop()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
