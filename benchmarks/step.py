"""python -m benchmarks.step --preset image_base --micro-batch 2 [section.key=value ...]: what a training step costs.

Times `Trainer.step` of `pretrain.train` itself, on random images and real masks, and prints one line of JSON; the same
as a table goes to stderr. Speed is given as a share of the matrix rate, which is measured between the timed steps. With
`--switch MODULE.NAME=VALUE,VALUE` steps take the values in turn, and nothing else is measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain.train
from models.config import ModelConfig
from models.data2vec import Batch
from models.fused import linear
from pretrain import parallel
from pretrain.config import PRECISIONS, Config, load
from pretrain.data.collate import COLLATES
from pretrain.data.sources import Sample
from pretrain.parallel import World
from pretrain.plan import samples, useful_work
from pretrain.settings import ConfigError
from pretrain.train import Trainer

ROOT = Path(__file__).parent.parent
GIB = 2**30
REST = "loss, targets, rest"
ATEN = torch.ops.aten
PRODUCTS = [ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm, ATEN.convolution, ATEN.convolution_backward]
PRODUCTS += [torch.ops.mkldnn._linear_pointwise] if linear.AVAILABLE else []
PRODUCTS += [getattr(ATEN, f"_scaled_dot_product_flash_attention_for_cpu{way}") for way in ("", "_backward")]
MATMUL_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Clock:
    """Exclusive time by part: whatever runs inside a wrapped call belongs to the innermost one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = {REST: 0.0}
        self._open, self._since = [REST], 0.0

    def start(self) -> None:
        self._since = now(self.device)

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        self.seconds.setdefault(part, 0.0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.charge()
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.charge()
                self._open.pop()

        return timed

    def charge(self) -> None:
        """Books the time since the last call on the innermost open part."""
        at = now(self.device)
        self.seconds[self._open[-1]] += at - self._since
        self._since = at


class Operators(TorchDispatchMode):
    """Counts torch's operators, views left out: the kernels that a GPU is asked for, but for Triton's; and seconds
    until those of the `PRODUCTS` have returned, which on the CPU is all that they take."""

    count, seconds = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.seconds += time.perf_counter() - start
        return out


def now(device: torch.device) -> float:
    """The time at which everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def taken_apart(trainer: Trainer) -> Iterator[Clock]:
    """Times the parts of the steps made inside."""
    clock, model = Clock(trainer.world.device), trainer.model
    places = [
        *((encoder.local, "forward", "local features") for encoder in (model.student, model.teacher) if encoder.local),
        (model.teacher, "context", "teacher"),
        *((block, "forward", "teacher") for block in model.teacher.blocks),
        (model.student, "forward", "student forward"),
        (model, "predict", "decoder forward"),
        (trainer.engine, "backward", "backward"),
        (pretrain.train, "optimizer_step", "optimizer"),
        (trainer.teacher, "update", "teacher update"),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, clock.wrap(getattr(owner, name), part)))
        clock.start()
        yield clock
        clock.charge()


class MatrixRate:
    """FLOP/s of one large square matrix product, what speed is compared with.

    On the CPU in fp32, of MKL's and oneDNN's the faster, so that no share looks good for want of a fast yardstick.
    """

    def __init__(self, device: torch.device, precision: str, repeats: int = 3) -> None:
        self.edge = 8192 if device.type == "cuda" else 2048
        self.device, self.repeats = device, repeats
        self.a, self.b = (
            torch.randn(self.edge, self.edge, device=device).to(MATMUL_DTYPE[precision]) for _ in range(2)
        )
        products: list[Callable[[], Tensor]] = [lambda: self.a @ self.b]
        if device.type == "cpu" and precision == "fp32" and linear.AVAILABLE:
            products.append(lambda: linear.product(self.a, self.b, None))
        self.products = products

    def __call__(self) -> float:
        return max(self._rate(product) for product in self.products)

    def _rate(self, product: Callable[[], Tensor]) -> float:
        seconds = []
        for _ in range(self.repeats):
            start = now(self.device)
            product()
            seconds.append(now(self.device) - start)
        return 2 * self.edge**3 / median(seconds)


def random_batches(config: Config, trainer: Trainer) -> Iterator[list[Batch]]:
    """Endless steps' worth of micro-batches: noise for inputs, masks as the loader's workers draw them."""
    plan, index = trainer.plan, 0
    collate = COLLATES[config.model.objective](config.model, config.train.seed)
    generator = torch.Generator().manual_seed(config.train.seed)
    while True:
        step = []
        for _ in range(plan.accumulation):
            noise = random_inputs(config.model, samples(config.model, plan.micro_batch), generator)
            step.append(collate([Sample(x, 0, index + i) for i, x in enumerate(noise)]))
            index += len(noise)
        yield step


def random_inputs(model: ModelConfig, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the largest samples: pixels, waveforms or token ids."""
    if model.modality == "audio":
        return torch.randn(count, model.length, generator=generator)
    if model.modality == "text":
        return torch.randint(model.text.pad + 1, model.text.vocabulary, (count, model.length), generator=generator)
    shape = (count, model.image.channels, model.length, model.length)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def peak_bytes(device: torch.device) -> int:
    """GPU: what tensors took. CPU: the process's largest resident set, interpreter and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Switch:
    """Values, in JSON, that a name of a module takes in turn: `models.fused.linear.FASTER=true,false`."""

    def __init__(self, given: str) -> None:
        """Raises ConfigError if there is no such name."""
        path, _, values = given.partition("=")
        module, _, self.name = path.rpartition(".")
        try:
            self.module = import_module(module)
            getattr(self.module, self.name)
            self.values = json.loads(f"[{values}]")
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"--switch {given}: {error}; should be MODULE.NAME=VALUE,VALUE") from None

    def to(self, value: Any) -> Any:
        return patch.object(self.module, self.name, value)


def measure(config: Config, world: World, steps: int, warmup: int, trace: Path | None = None) -> dict[str, Any]:
    """The figures of one configuration. `trace`: also writes a Chrome trace of one more step."""
    trainer = Trainer(config, world)
    figures = measured(trainer, steps, warmup, trace)
    trainer.engine.destroy()
    return figures


def timed_step(trainer: Trainer, batch: list[Batch]) -> tuple[float, float]:
    """Seconds it took, and those until the host had asked for all of it."""
    device = trainer.world.device
    start = now(device)
    _, result = trainer.step(batch)
    asked = time.perf_counter() - start
    seconds = now(device) - start
    assert result.applied or trainer.config.train.precision == "fp16", "the gradient is not finite"
    return seconds, asked


def samples_of_a_step(trainer: Trainer) -> int:
    """Of this rank."""
    return samples(trainer.config.model, trainer.plan.micro_batch) * trainer.plan.accumulation


def work_of_a_step(trainer: Trainer) -> float:
    """FLOP that the method needs, of this rank."""
    return useful_work(trainer.config.model).total * samples_of_a_step(trainer)


def in_turn(trainer: Trainer, switch: Switch, steps: int, warmup: int) -> dict[str, Any]:
    """Median seconds, share of the matrix rate around each step, and every step's, of each value; one batch for all."""
    matrix_rate = MatrixRate(trainer.world.device, trainer.config.train.precision)
    batch, work = next(random_batches(trainer.config, trainer)), work_of_a_step(trainer)
    seen: dict[str, list[tuple[float, float]]] = {json.dumps(value): [] for value in switch.values}
    for i in range(warmup + steps):
        for value in reversed(switch.values) if i % 2 else switch.values:
            before = matrix_rate()
            with switch.to(value):
                seconds, _ = timed_step(trainer, batch)
            if i >= warmup:
                seen[json.dumps(value)].append((seconds, 2 * work / seconds / (before + matrix_rate())))
    return {
        value: {
            "seconds": median(seconds for seconds, _ in each),
            "matrix_share": median(share for _, share in each),
            "seconds_each": [seconds for seconds, _ in each],
            "matrix_share_each": [share for _, share in each],
        }
        for value, each in seen.items()
    }


def measured(trainer: Trainer, steps: int, warmup: int, trace: Path | None = None) -> dict[str, Any]:
    config, world = trainer.config, trainer.world
    device, plan, work = world.device, trainer.plan, work_of_a_step(trainer)
    batches, matrix_rate = random_batches(config, trainer), MatrixRate(device, config.train.precision)
    step = partial(timed_step, trainer)
    for _ in range(warmup):
        step(next(batches))
    times: list[float] = []
    asked: list[float] = []
    rates = [matrix_rate()]
    for _ in range(steps):
        took = step(next(batches))
        times.append(took[0])
        asked.append(took[1])
        rates.append(matrix_rate())
    peak = peak_bytes(device)

    apart = []
    for _ in range(steps):
        batch = next(batches)
        with taken_apart(trainer) as clock:
            seconds, _ = step(batch)
        apart.append((seconds, clock.seconds))
    products = []
    for _ in range(steps if device.type == "cpu" else 1):
        before = matrix_rate()
        with Operators() as operators:
            step(next(batches))
        products.append(2 * work / operators.seconds / (before + matrix_rate()))
    instrumented, parts = sorted(apart, key=lambda pair: pair[0])[len(apart) // 2]
    if trace:
        write_trace(lambda: step(next(batches)), trace, device)

    count = samples_of_a_step(trainer)
    beside = [(before + after) / 2 for before, after in pairwise(rates)]
    seconds = median(times)
    return {
        "seconds": seconds,
        "seconds_each": times,
        "host_seconds": median(asked),
        "operators": operators.count,
        "parts": parts,
        "instrumented_seconds": instrumented,
        f"{config.model.unit}_per_s": count * world.size / seconds,
        "masked_views_per_s": count * world.size * config.model.num_masks / seconds,
        "tflop": work / 1e12,
        "tflop_per_s": work / seconds / 1e12,
        "matrix_tflop_per_s": median(rates) / 1e12,
        "matrix_share": median(work / t / rate for t, rate in zip(times, beside, strict=True)),
        "matrix_share_of_products": median(products) if device.type == "cpu" else None,
        "peak_gib": peak / GIB,
        "precision": config.train.precision,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "ranks": world.size,
        "hardware": hardware(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def write_trace(step: Callable[[], object], trace: Path, device: torch.device) -> None:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        step()
    profiler.export_chrome_trace(str(trace))
    print(profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=40), file=sys.stderr)


def table(figures: dict[str, Any]) -> str:
    """The same for people."""
    whole = figures["instrumented_seconds"]
    rate, unit = next((v, k.removesuffix("_per_s")) for k, v in figures.items() if k.endswith("s_per_s"))
    rows = [f"{part:20} {seconds:9.4f} s {seconds / whole:6.1%}" for part, seconds in figures["parts"].items()]
    alone = figures["matrix_share_of_products"]
    products = "" if alone is None else f"; products alone would have {alone:.1%}"
    return "\n".join([
        *rows,
        f"{'host is done after':20} {figures['host_seconds']:9.4f} s",
        f"{'taken apart, whole':20} {whole:9.4f} s",
        f"{'step':20} {figures['seconds']:9.4f} s  {rate:.4g} {unit}/s, "
        f"{figures['masked_views_per_s']:.4g} masked views/s",
        f"{'matrix work':20} {figures['tflop_per_s']:9.4g} TFLOP/s a rank, {figures['matrix_share']:.1%} of the matrix "
        f"rate of {figures['matrix_tflop_per_s']:.4g}{products}",
        f"{'peak memory':20} {figures['peak_gib']:9.2f} GiB a rank",
    ])  # fmt: skip


def turns(figures: dict[str, Any]) -> str:
    """`in_turn` for people."""
    rows = [f"{value:20} {f['seconds']:9.4f} s {f['matrix_share']:6.1%}" for value, f in figures.items()]
    return "\n".join([f"{'value':20} {'step':>11} {'of the matrix rate'}", *rows])


def rounded(value: Any) -> Any:
    """Five significant digits are more than any of this is good for."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.step", description="Time a training step and its parts.")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--preset", default="image_base", help="a configuration of configs/pretrain, without .yaml")
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=2,
        help="of a rank (train.batch_size accumulates): images, blocks, or for speech clips",
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="the second step still takes memory for the first time")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=0)
    parser.add_argument("--threads", type=int, help="of torch on CPU")
    parser.add_argument("--profile", type=Path, metavar="TRACE.json", help="also write a trace of one more step")
    parser.add_argument("--switch", metavar="MODULE.NAME=VALUE,VALUE", help="steps with each in turn")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_intermixed_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    if args.switch and args.profile:
        parser.error("--switch times steps alone; leave --profile out")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    world = parallel.start()
    ours = [
        f"train.precision={args.precision}",
        f"train.deepspeed=ds_configs/zero{args.zero}.json",
        f"train.threads={args.threads or 'null'}",
    ]
    try:
        path = ROOT / "configs" / "pretrain" / f"{args.preset}.yaml"
        size = args.micro_batch * load(path, args.overrides).model.sample_size
        sizes = [f"train.micro_batch={size}", f"train.batch_size={size * world.size}"]
        config = load(path, ours + sizes + args.overrides)
        if args.switch:
            switch = Switch(args.switch)
            figures = in_turn(Trainer(config, world), switch, args.steps, args.warmup)
        else:
            figures = measure(config, world, args.steps, args.warmup, args.profile)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        parallel.stop()
    if world.is_main:
        command = shlex.join(["python", "-m", "benchmarks.step", *sys.argv[1:]])
        print(turns(figures) if args.switch else table(figures), file=sys.stderr)
        print(json.dumps({"command": command, "preset": args.preset, "zero": args.zero} | rounded(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
