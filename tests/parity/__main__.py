"""python -m tests.parity DIR [--zero 0 1 1_offload...] [--ranks N] [--tp 1 2]: how far from the authors' numbers.

DIR holds golden cases, <case>.json and <case>.safetensors; tests/parity/golden has those of set A. Exit status 1 if any
bound is exceeded.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

from pretrain import parallel
from tests.parity.replay import cases, replay

ZERO = [
    path.stem.removeprefix("zero") for path in sorted((Path(__file__).parents[2] / "ds_configs").glob("zero*.json"))
]


def main() -> int:
    parser = argparse.ArgumentParser("tests.parity", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--zero", choices=ZERO, nargs="+", default=["1"], help="of ds_configs/zero*.json")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share every batch")
    parser.add_argument("--tp", type=int, nargs="+", default=[1], help="of them, those that split every layer")
    parser.add_argument("--brief", action="store_true", help="without the runs that decay all parameters")
    args = parser.parse_args()
    if len(set(args.tp) - {1}) > 1:
        parser.error(f"--tp {' '.join(map(str, args.tp))}: groups stay split; should be one number, or 1 and another")
    if args.ranks > 1 and "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        return subprocess.call([sys.executable, *launcher, "-m", "tests.parity", *sys.argv[1:]])
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    found = cases(args.folder)
    if not found:
        print(f"error: {args.folder} holds no case (a .json beside a .safetensors of the same name)", file=sys.stderr)
        return 2
    whole = parallel.start()
    failed = 0
    for split in sorted(set(args.tp)):  # 1 first: DeepSpeed keeps the groups that it was given once
        world = parallel.split_world(whole, split)
        failed += sum(replayed(found, zero, world, args.brief) for zero in args.zero)
    parallel.stop()
    return 1 if failed else 0


def replayed(found: list[Path], zero: str, world: parallel.World, brief: bool) -> int:
    """Prints how far each case is off; the number of bounds exceeded."""
    failed = 0
    say = print if world.is_main else lambda *_: None
    for path in found:
        for row in replay(path, zero, world, brief):
            failed += not row.ok
            verdict = "ok" if row.ok else "EXCEEDED"
            say(f"{path.stem:16} {row.quantity:28} error {row.error:8.1e}  bound {row.bound:.0e}  {verdict}")
    verdict = f"{failed} bounds exceeded" if failed else "all within bounds"
    shared = f" on {world.size} ranks" if world.size > 1 else ""
    shared += f", {world.tensor_ranks} of them tensor-parallel" if world.tensor_ranks > 1 else ""
    say(f"{len(found)} cases replayed at ZeRO {zero}{shared}: {verdict}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
