"""python -m benchmarks.gpu [--out DIR] [--minutes 8]: every figure that a new GPU is asked for, in one go.

Steps of all presets, part by part; each fused layer against torch's operators, switched within one run; eager against
compiled; recomputing; each Adam that is there; a real loader; the baselines' steps; a Chrome trace, and how often the
host waits in a step. Writes figures.json, table.md and trace.json into DIR. What no time is left for, or is not
installed, is named, not measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.step import GIB, ROOT, MatrixRate, hardware, measured, now, peak_bytes, random_batches, rounded
from models.fused import kernels
from models.fused.kernels import Kernels
from pretrain import baselines, parallel
from pretrain.config import Config, batch_plan, load
from pretrain.data.loader import build_dataset, build_loader
from pretrain.engine import read_mechanics
from pretrain.layout import Zero
from pretrain.parallel import World
from pretrain.plan import memory, samples
from pretrain.progress import Progress
from pretrain.settings import ConfigError
from pretrain.train import Trainer

DATASHEET = 989e12  # FLOP/s of an H100 SXM in bf16 without sparsity; what published shares are of
TARGETS = {"image_base": 0.35, "image_large": 0.45, "image_huge14": 0.45, "audio_large": 0.40, "text_large": 0.40}
PRESETS = ("image_large", "image_huge14", "audio_large", "text_large", "image_base", "audio_base", "text_base")
COMPARED = ("image_large", "audio_large", "text_large")  # kernels, one modality each
BASELINES = ("mae_base", "wav2vec2_base", "roberta_base")  # transformers' networks, of the size of ours
ROOM = 0.7  # of the memory, for what is estimated
ROUNDS = 4


Use = Callable[[Trainer], dict[str, Any]]
"""What finds figures of a trainer."""


class Case(NamedTuple):
    name: str
    run: Callable[[], dict[str, Any]]


def prepare(preset: str, precision: str, overrides: Sequence[str], most: int = 128) -> Config:
    """A preset whose global batch is one micro-batch: the largest power of two that fits the device, `most` at most."""
    path = ROOT / "configs" / "pretrain" / f"{preset}.yaml"
    ours = [f"train.precision={precision}", "train.deepspeed=ds_configs/zero1.json"]
    room = torch.cuda.get_device_properties(0).total_memory * ROOM if torch.cuda.is_available() else 4 * GIB
    config, count = None, 1
    while config is None or count <= most:
        size = count * load(path, overrides).model.sample_size
        larger = load(path, [*ours, f"train.micro_batch={size}", f"train.batch_size={size}", *overrides])
        plan = batch_plan(larger.train, 1)
        if config and memory(larger, plan, Zero.of(read_mechanics(larger.train.deepspeed))).total > room:
            break
        config, count = larger, 2 * count
    return config


def with_trainer(config: Config, world: World, use: Use) -> dict[str, Any]:
    """What `use` finds of a trainer that lives no longer."""
    trainer: Trainer | None = None
    try:
        trainer = baselines.start(config, world).build(None)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return use(trainer)
    finally:
        if trainer:
            trainer.engine.destroy()
        del trainer
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def variants(trainer: Trainer, choices: dict[str, Kernels]) -> dict[str, Any]:
    """Seconds of a step with each choice of kernels, taken in turn."""
    batches, seconds = random_batches(trainer.config, trainer), {name: list[float]() for name in choices}
    for turn in range(ROUNDS + 1):
        for name, choice in choices.items():
            kernels.use(choice)
            micro_batches = next(batches)
            start = now(trainer.world.device)
            trainer.step(micro_batches)
            if turn:  # the first has compiled
                seconds[name].append(now(trainer.world.device) - start)
    kernels.use(trainer.config.train.kernels)
    found = {name: median(times) for name, times in seconds.items()}
    return {"seconds": found, "ratio_to_fused": {name: value / found["fused"] for name, value in found.items()}}


def kernel_choices(device: torch.device) -> dict[str, Kernels]:
    """The fused layers that are taken by themselves, none, all but one, one more of those that are not, and apex's."""
    parts = [part for part, choices in kernels.CHOICES.items() if "triton" in choices]
    without = {f"fused but {part}": Kernels(**{part: "torch"}) for part in parts if part not in kernels.ON_REQUEST}
    more = {f"fused and {part}": Kernels(**{part: "triton"}) for part in kernels.ON_REQUEST}
    apex = Kernels(norm="apex")
    others = {} if kernels.problems(apex, device) else {"fused but apex's norm": apex}
    return {"fused": Kernels(), "torch": Kernels(**dict.fromkeys(parts, "torch"))} | without | more | others


def not_here(device: torch.device) -> list[str]:
    """Why optional packages are not measured, a sentence each."""
    choices = (Kernels(adam="deepspeed"), Kernels(adam="apex"), Kernels(norm="apex"))
    return [sentence for choice in choices for sentence in kernels.problems(choice, device)]


def stepped(trainer: Trainer, preset: str, steps: int, trace: Path | None) -> dict[str, Any]:
    """`benchmarks.step`'s figures, and what is asked for."""
    found = measured(trainer, steps, 2, trace)
    share = found["tflop_per_s"] * 1e12 / DATASHEET
    return found | {"datasheet_share": share, "target": TARGETS.get(preset)}


def switched(trainer: Trainer) -> dict[str, Any]:
    return variants(trainer, kernel_choices(trainer.world.device))


def agreement(trainer: Trainer) -> dict[str, Any]:
    """How far loss and gradients by kernels are from those by torch's operators, as shares, nothing being drawn."""
    (batch,) = next(random_batches(trainer.config, trainer))
    batch = batch.to(trainer.world.device)
    learned = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.model.eval()
    reference: Tensor | None = None
    off = {}
    choices = kernel_choices(trainer.world.device)
    for name in ("torch", *(other for other in choices if other != "torch")):
        kernels.use(choices[name])
        loss = trainer.model(batch).regression
        gradients = torch.autograd.grad(loss, learned, allow_unused=True)
        found = torch.cat([x.detach().float().flatten() for x in (loss, *gradients) if x is not None])
        if reference is None:
            reference = found
        loss_off = (found[0] - reference[0]) / reference[0]
        off[name] = [float(loss_off.abs()), float((found[1:] - reference[1:]).norm() / reference[1:].norm())]
    kernels.use(trainer.config.train.kernels)
    return {"off": off}


def alone(trainer: Trainer) -> dict[str, Any]:
    """A step, whatever takes it."""
    seconds = variants(trainer, {"fused": Kernels()})["seconds"]["fused"]
    count = samples(trainer.config.model, trainer.plan.micro_batch)
    peak = peak_bytes(trainer.world.device) / GIB
    return {"step_seconds": seconds, "samples_per_s": count / seconds, "micro_batch": count, "peak_gib": peak}


def waits(trainer: Trainer) -> dict[str, Any]:
    """How often torch sees the host wait for the GPU in a step."""
    first, second = islice(random_batches(trainer.config, trainer), 2)
    trainer.step(first)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.step(second)
    torch.cuda.set_sync_debug_mode("default")
    return {"waits": [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]}


def from_loader(trainer: Trainer, folder: Path, steps: int) -> dict[str, Any]:
    """Samples a second of the loop's own loader and steps together, which wait for nothing but each other."""
    config = replace(trainer.config, data=replace(trainer.config.data, path=str(folder)))
    batches = build_loader(build_dataset(config, progress=False), config, trainer.plan, trainer.world, 0)
    for _ in range(2):
        trainer.step([next(batches)])
    start = now(trainer.world.device)
    for _ in range(steps):
        trainer.step([next(batches)])
    seconds = (now(trainer.world.device) - start) / steps
    batches.close()
    count = samples(config.model, trainer.plan.micro_batch)
    return {"seconds": seconds, "samples_per_s": count / seconds, "workers": config.data.workers}


def cases(world: World, out: Path, args: argparse.Namespace) -> list[Case]:
    """In the order of their weight: the last are left out first."""

    def case(name: str, preset: str, use: Use, *more: str, most: int = args.most) -> Case:
        overrides = [*more, *args.overrides]
        return Case(
            f"{name} {preset}",
            lambda: with_trainer(prepare(preset, args.precision, overrides, most), world, use),
        )

    def timed(preset: str, trace: Path | None = None) -> Use:
        return partial(stepped, preset=preset, steps=args.steps, trace=trace)

    first, *others = args.presets
    found = [case("step", first, timed(first, out / "trace.json"))]
    found += [case("step", preset, timed(preset)) for preset in others]
    if world.device.type == "cuda":
        found += [case("waits", preset, waits) for preset in args.compared]
    still = "model.mask.noise_std=0"
    found += [case("agreement", preset, agreement, still, most=min(4, args.most)) for preset in args.compared]
    found += [case("kernels", preset, switched) for preset in args.compared]
    found.append(case("compiled", first, timed(first), "train.compile=true"))
    found.append(case("recomputed", first, timed(first), "train.recompute=true"))
    adams = [a for a in kernels.CHOICES["adam"] if a != "auto" and not kernels.problems(Kernels(adam=a), world.device)]
    found += [case(f"adam by {adam}", first, alone, f"train.kernels.adam={adam}") for adam in adams]
    found += [case("baseline", preset, alone) for preset in args.baselines]
    if args.data:
        workers = f"data.workers={max(1, (os.cpu_count() or 2) - 1)}"
        found.append(case("loader", first, partial(from_loader, folder=args.data, steps=args.steps), workers))
    return found


def found_of(case: Case) -> dict[str, Any]:
    """Its figures; of a case that fails, which costs no other, why."""
    try:
        return rounded(case.run())
    except (RuntimeError, ImportError, ConfigError) as error:
        return {"error": kernels.reason(error)}


def table(figures: dict[str, Any]) -> str:
    """The same in Markdown."""
    lines = [
        f"{figures['hardware']}, torch {figures['torch']}, {figures['precision']}, matrix rate "
        f"{figures['matrix_tflop_per_s']:.4g} TFLOP/s, {figures['date']}: `{figures['command']}`",
        "",
        "| step | micro-batch | ms | of them the host's | samples/s | TFLOP/s | of 989 | asked | peak, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in figures["cases"].items():
        if "tflop_per_s" in found:
            rate = next(value for key, value in found.items() if key.endswith("s_per_s"))
            asked = f"{found['target']:.0%}" if found["target"] else ""
            lines.append(
                f"| {name} | {found['micro_batch']} | {1000 * found['seconds']:.1f} | "
                f"{1000 * found['host_seconds']:.1f} | {rate:.4g} | "
                f"{found['tflop_per_s']:.4g} | {found['datasheet_share']:.1%} | {asked} | {found['peak_gib']:.1f} |"
            )
    for name, found in figures["cases"].items():
        if "parts" in found:
            whole = found["instrumented_seconds"]
            parts = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in found["parts"].items())
            lines += ["", f"{name}, taken apart: {parts}."]
        elif "ratio_to_fused" in found:
            rows = (
                f"| {key} | {1000 * found['seconds'][key]:.1f} | {r:.3f} |"
                for key, r in found["ratio_to_fused"].items()
            )
            lines += ["", f"| {name} | ms | to fused |", "|---|---|---|", *rows]
        elif "off" in found:
            worst = (f"{key} {loss:.1e}, {gradient:.1e}" for key, (loss, gradient) in found["off"].items())
            lines += ["", f"{name}, off torch's loss and gradient by shares of: {'; '.join(worst)}."]
        elif "waits" in found:
            lines += ["", f"{name}: the host waits {len(found['waits'])} times in a step. {' '.join(found['waits'])}"]
        elif "step_seconds" in found:
            lines += [
                "",
                f"{name}: {1000 * found['step_seconds']:.1f} ms for {found['micro_batch']} samples, "
                f"{found['samples_per_s']:.4g} a second, {found['peak_gib']:.1f} GiB.",
            ]
        elif "samples_per_s" in found:
            lines += ["", f"{name}: {found['samples_per_s']:.4g} samples/s with {found['workers']} workers."]
        elif "error" in found:
            lines += ["", f"{name}: {found['error']}"]
    if figures["left_out"]:
        lines += ["", f"No time was left for: {', '.join(figures['left_out'])}."]
    lines += [line for sentence in figures["not_here"] for line in ("", f"Left out: {sentence}.")]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.gpu", description="All measurements of a GPU in one go.")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=8, help="begins nothing that would end behind them")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--compared", nargs="+", default=list(COMPARED), help="presets whose kernels are compared")
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES))
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--most", type=int, default=128, help="samples a micro-batch")
    parser.add_argument("--data", type=Path, help="images for the loader's case")
    args = parser.parse_intermixed_args()
    began = time.monotonic()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    world = parallel.start()
    args.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(world.device),
        "torch": torch.__version__,
        "precision": args.precision,
        "matrix_tflop_per_s": MatrixRate(world.device, args.precision)() / 1e12,
        "cases": {},
        "left_out": [],
        "not_here": not_here(world.device),
    }
    longest = 0.0
    try:
        todo = cases(world, args.out, args)
        with Progress("measuring", len(todo)) as told:
            for case in todo:
                start = time.monotonic()
                if start - began + longest > 60 * args.minutes:
                    figures["left_out"].append(case.name)
                else:
                    figures["cases"][case.name] = found_of(case)
                    longest = max(longest, time.monotonic() - start)
                told.advance(1)
                (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
                (args.out / "table.md").write_text(table(figures))
    finally:
        parallel.stop()
    print(table(figures))
    return 1 if any("error" in found for found in figures["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
