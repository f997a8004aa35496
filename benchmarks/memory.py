"""python -m benchmarks.memory [section.key=value ...] [--zero 0 1 2 3] [--ranks 1 2 4]: what each rank really holds.

Starts real ranks, trains two steps, and walks the tensors that are alive: bytes of weights, gradients, optimizer and
teacher, beside what `pretrain.plan.memory` expects. Exit status 1 if any two are more than 5% apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import pretrain.train
from benchmarks.step import ROOT, random_batches
from pretrain import parallel
from pretrain.config import PRECISIONS, Config, data_ranks, load
from pretrain.engine import read_mechanics
from pretrain.layout import Zero
from pretrain.parallel import World
from pretrain.pieces import stretches
from pretrain.plan import memory
from pretrain.settings import ConfigError
from pretrain.train import Trainer

TOLERANCE = 0.05
# Wide enough for parameters that ZeRO 3 partitions, and for padding to be small.
MODEL = ("model.width=256", "model.depth=3", "train.micro_batch=1", "run.dir=unused")
# Where ZeRO's optimizers keep gradients, or room for them; not all exist at every stage.
GRADIENTS = (
    *("averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer"),
    *("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload", "accumulated_grads_in_cpu"),
    "param_buffer_of_bit16_for_cpu_offload_groups",
)
OTHER = "other"


class Line(NamedTuple):
    """Bytes of one category on one rank."""

    zero: str
    precision: str
    ranks: int
    rank: int
    category: str
    expected: float
    measured: float

    @property
    def distance(self) -> float:
        """Bytes too many or too few; of what no category explains, where `expected` is all that is held, every one."""
        return self.measured if self.category == OTHER else abs(self.measured - self.expected)

    @property
    def apart(self) -> bool:
        return self.distance > TOLERANCE * self.expected


def tensors(found: Any) -> Iterator[Tensor]:
    """Tensors in nested containers."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from tensors(value)
    elif isinstance(found, list | tuple | set):
        for value in found:
            yield from tensors(value)


def storages(found: Iterable[Any]) -> dict[int, int]:
    """Address -> bytes of every storage behind tensors, however many of them share it."""
    each = (tensor.untyped_storage() for tensor in tensors(list(found)) if tensor.device.type != "meta")
    return {storage.data_ptr(): storage.nbytes() for storage in each if storage.nbytes()}


def forget() -> None:
    """What is alive now does not count as held later, nor is it looked through again."""
    gc.collect()
    gc.freeze()


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes by category, each storage in the first that has it; the last has what was made since `forget`."""
    gc.collect()  # or what has been dropped is alive
    engine, optimizer = trainer.engine, trainer.engine.optimizer
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    masters = list({id(s.tensor): s.tensor for s in stretches(engine)}.values())
    kept = [getattr(optimizer, name, None) for name in GRADIENTS]
    buckets = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    found = {
        "buffers": storages(buckets),
        "weights": storages([p.data, getattr(p, "ds_tensor", None)] for p in trained),
        "teacher": storages([
            trainer.teacher.averages,
            *([p.data, getattr(p, "ds_tensor", None)] for p in trainer.model.teacher.parameters()),
        ]),
        "optimizer": storages([masters, list(engine.basic_optimizer.state.values())]),
        "gradients": storages([*kept, *([p.grad, getattr(p, "grad_accum", None)] for p in trained)])
        | storages(master.grad for master in masters),
        OTHER: storages(thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)),
    }  # fmt: skip
    seen: dict[int, int] = {}
    out = {}
    for category, addresses in found.items():
        out[category] = sum(size for address, size in addresses.items() if address not in seen)
        seen |= addresses
    return out


@contextmanager
def watching(trainer: Trainer) -> Iterator[dict[str, int]]:
    """Of each category the most that the steps made inside hold at once, looked at before gradients are reduced and
    before the optimizer's step; of what belongs to none, the least."""
    most: dict[str, int] = {}

    def looking(function: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: Any, **kwargs: Any) -> Any:
            for category, size in held(trainer).items():
                choose = min if category == OTHER else max  # a collective's threads let go of tensors a little later
                most[category] = choose(most.get(category, size), size)
            return function(*args, **kwargs)

        return look

    with ExitStack() as stack:
        for owner, name in ((trainer.engine, "allreduce_gradients"), (pretrain.train, "optimizer_step")):
            stack.enter_context(patch.object(owner, name, looking(getattr(owner, name))))
        yield most


def compared(trainer: Trainer, most: dict[str, int]) -> list[Line]:
    """What was held, beside what is expected of this rank."""
    config, world = trainer.config, trainer.world
    zero = Zero.of(read_mechanics(config.train.deepspeed))
    expected = vars(memory(config, trainer.plan, zero, world.data_rank))
    states = sum(expected[category] for category in most if category not in (OTHER, "buffers"))
    where = (Path(config.train.deepspeed).stem.removeprefix("zero"), config.train.precision, world.size, world.rank)
    return [
        Line(*where, category, states if category == OTHER else expected[category], size)
        for category, size in most.items()
    ]


def measure(config: Config, world: World) -> list[Line]:
    """Expected and measured bytes of this rank in its second step."""
    forget()
    trainer = Trainer(config, world)
    batches = random_batches(config, trainer)
    trainer.step(next(batches))  # the optimizer's state is made
    with watching(trainer) as most:
        trainer.step(next(batches))
    trainer.engine.destroy()
    return compared(trainer, most)


def work(args: argparse.Namespace, folder: Path) -> None:
    """One of several ranks: all stages and precisions in turn."""
    world = parallel.start(args.tensor_parallel)
    lines = []
    for zero, precision in product(args.zero, args.precision):
        # Where the host's memory is the device's, fp32 averages need no copy of their own.
        if precision != "fp32" or not zero.endswith("offload"):
            lines += measure(configured(args, zero, precision, world.size), world)
    (folder / f"rank{world.rank}.json").write_text(json.dumps(lines))
    parallel.stop()


def configured(args: argparse.Namespace, zero: str, precision: str, ranks: int) -> Config:
    """Two micro-steps, so that gradients accumulate."""
    path = ROOT / "configs" / "pretrain" / f"{args.preset}.yaml"
    ours = [*MODEL, f"train.precision={precision}", f"train.deepspeed=ds_configs/zero{zero}.json"]
    ours += [f"train.tensor_parallel={args.tensor_parallel}", *args.overrides]
    size = 2 * data_ranks(ranks, args.tensor_parallel) * (load(path, ours).train.micro_batch or 1)
    return load(path, [*ours, f"train.batch_size={size}"])


def launch(arguments: list[str], ranks: int, timeout: float) -> list[Line]:
    """Runs this module under torchrun. Raises RuntimeError with its last words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "benchmarks.memory", f"--work={folder}", *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"{ranks} ranks were not done after {timeout:g} s") from None
        if process.returncode:
            raise RuntimeError(f"{ranks} ranks failed:\n{errors[-4000:]}")
        files = sorted(Path(folder).glob("rank*.json"))
        return [Line(*line) for file in files for line in json.loads(file.read_text())]


def table(lines: list[Line]) -> str:
    """A row for each stage, precision, number of ranks and category: the rank that is furthest off."""
    worst: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        key = (line.zero, line.precision, line.ranks, line.category)
        worst[key] = max(worst.get(key, line), line, key=lambda one: one.distance)
    rows = [f"{'ZeRO':10} {'precision':9} {'ranks':>5} {'category':10} {'expected':>14} {'measured':>14} {'ratio':>7}"]
    for line in worst.values():
        if line.category == OTHER:
            expected, ratio = "-", f"{line.measured / line.expected:7.2%}"
        elif line.expected == line.measured == 0:
            continue
        else:
            expected, ratio = (
                f"{line.expected:,.0f}",
                f"{line.measured / line.expected:7.4f}" if line.expected else "inf",
            )
        rows.append(
            f"{line.zero:10} {line.precision:9} {line.ranks:5} {line.category:10} {expected:>14} {line.measured:14,} "
            f"{ratio:>7}" + ("  more than 5% apart" if line.apart else "")
        )
    return "\n".join(
        [*rows, "bytes on the rank that is furthest off; 'other' is what no category explains, as a share"]
    )


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.memory", description="Expected and measured bytes of every rank.")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--preset", default="image_demo", help="a configuration of configs/pretrain, without .yaml")
    parser.add_argument(
        "--zero", nargs="+", default=["0", "1", "2", "3"], help="zero*.json of ds_configs: 0, 2_offload"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks of them that split every layer")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS[:2], default=list(PRECISIONS[:2]))
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one number of ranks")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if args.work:
        work(args, args.work)
        return 0
    try:
        for zero in args.zero:
            configured(args, zero, args.precision[0], max(args.ranks))
            read_mechanics(f"ds_configs/zero{zero}.json")
        passed = [
            *(f"--preset={args.preset}", "--zero", *args.zero, "--precision", *args.precision),
            *(f"--tensor-parallel={args.tensor_parallel}", *args.overrides),
        ]
        lines = [line for ranks in args.ranks for line in launch(passed, ranks, args.timeout)]
    except (ConfigError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(lines))
    return int(any(line.apart for line in lines))


if __name__ == "__main__":
    sys.exit(main())
