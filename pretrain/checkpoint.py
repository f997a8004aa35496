"""Checkpoints that survive a kill at any moment.

    checkpoints/
        step_00001000/      DeepSpeed's files, teacher_*.safetensors a rank, state.json
        latest              the name of the newest complete one, moved last

A checkpoint is written beside, as `.partial-*`, made durable, renamed, and only then pointed to. Student and decoder
weights, fp32 masters, Adam's moments and the loss scale are DeepSpeed's; the teacher and the position in the run ours.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from pretrain.config import Config, RunConfig, flat, to_yaml
from pretrain.ema import ShardedTeacher
from pretrain.files import flush, write_atomically
from pretrain.parallel import World

PARTIAL = ".partial-"
PACKING = "train.micro_batch"  # of samples that differ in length it decides which of them meet
# What may change between a run and its continuation.
FREE = (
    "run.",
    "watch.",
    "data.workers",
    "data.path",
    "data.max_failed_share",
    "data.image.max_pixels",
    "train.threads",
    PACKING,
    "train.deepspeed",
)
DAMAGED = (OSError, RuntimeError, KeyError, ValueError, EOFError, AssertionError, UnpicklingError, SafetensorError)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, in one line."""


@dataclass
class RunState:
    """Where a run is. Everything random follows from these numbers and the seed."""

    step: int = 0  # optimizer steps taken
    batches: int = 0  # global batches consumed; more than steps where fp16 had to skip
    read: int = 0  # samples that this rank has been through
    failures: int = 0  # of them, those whose file could not be decoded
    samples: int = 0  # in the data set; another number would be another stream


def save(
    folder: Path,
    engine: deepspeed.DeepSpeedEngine,
    teacher: ShardedTeacher,
    state: RunState,
    config: Config,
    world: World,
) -> Path:
    """Writes the checkpoint of `state.step` and moves the pointer to it. Collective: every rank calls it."""
    name = f"step_{state.step:08d}"
    read, failures = world.sum(torch.tensor([state.read, state.failures], device=world.device)).tolist()
    partial, final = folder / (PARTIAL + name), folder / name
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier(world)
    engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=True)
    if world.is_main or engine.zero_optimization_stage() > 0:
        teacher.save(partial / f"teacher_{world.rank:05d}.safetensors")
    if world.is_main:
        meta = asdict(state) | {
            "read": read,
            "failures": failures,
            "ranks": world.size,
            "zero_stage": engine.zero_optimization_stage(),
            "precision": config.train.precision,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        }
        (partial / "state.json").write_text(json.dumps(meta, indent=2) + "\n")
        (partial / "config.yaml").write_text(to_yaml(config))
    _barrier(world)
    if world.is_main:
        for file in partial.rglob("*"):
            flush(file)
        if final.exists():  # the same step, saved by a run that was killed before it moved the pointer
            shutil.rmtree(final)
        partial.rename(final)
        flush(folder)
        write_atomically(folder / "latest", name + "\n")
        prune(folder, name, config.run)
    _barrier(world)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None if there is none yet. CheckpointError if the pointer leads nowhere."""
    try:
        newest = folder / (folder / "latest").read_text().strip()
    except FileNotFoundError:
        return None
    if not (newest / "state.json").is_file():
        there = ", ".join(path.name for path in sorted(folder.glob("step_*"))) or "none"
        raise CheckpointError(f"{folder / 'latest'} names {newest.name}, which is not there; these are: {there}")
    return newest


def load(path: Path, engine: deepspeed.DeepSpeedEngine, teacher: ShardedTeacher, world: World) -> RunState:
    """Restores everything from a checkpoint of the same ZeRO stage, precision and number of ranks.

    Raises CheckpointError if it was written by another layout, does not fit or is damaged.
    """
    try:
        meta = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no complete checkpoint: {error}") from None
    for key, here in (("ranks", world.size), ("zero_stage", engine.zero_optimization_stage())):
        if meta[key] != here:
            raise CheckpointError(
                f"{path} was written with {key}={meta[key]}, this run has {here}; use the same, or "
                "start in a new run.dir"
            )
    try:
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name, custom_load_fn=_load_trained)
        if loaded is None:
            raise FileNotFoundError("no model states in it")
        teacher.load(sorted(path.glob("teacher_*.safetensors")))
        read, failures = (meta["read"], meta["failures"]) if world.is_main else (0, 0)
        return RunState(meta["step"], meta["batches"], read, failures, meta["samples"])
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path} is damaged ({reason}); write the name of an older one into latest") from None


def prune(folder: Path, newest: str, run: RunConfig) -> None:
    """Deletes what neither keep_last nor keep_every holds on to, what a kill left half-written, and what lies after
    `newest`: the future of a run that went on from an earlier step."""
    for path in folder.glob(PARTIAL + "*"):
        shutil.rmtree(path, ignore_errors=True)
    saved = sorted(folder.glob("step_*"))
    past = [path for path in saved if path.name <= newest]
    every = [p for p in past if run.keep_every and int(p.name.removeprefix("step_")) % run.keep_every == 0]
    for path in set(saved) - set(past[-run.keep_last :]) - set(every):
        # Renamed first, so that a kill in between leaves rubbish, not a checkpoint that looks whole.
        rubbish = path.rename(folder / (PARTIAL + path.name))
        shutil.rmtree(rubbish, ignore_errors=True)


def differences(old: Config, new: Config) -> list[str]:
    """Settings of the two that differ, as "key: old -> new"; where a run lives and how often it speaks aside."""
    before, after = flat(old), flat(new)
    free = FREE if new.model.sample_size == 1 else tuple(k for k in FREE if k != PACKING)
    return [f"{k}: {before[k]} -> {after[k]}" for k in after if before[k] != after[k] and not k.startswith(free)]


def _load_trained(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Strict but for the teacher, whose weights come from its own files."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    missing = [name for name in missing if not name.startswith("teacher.")]
    if missing or unexpected:
        raise CheckpointError(f"weights do not fit this model: missing {missing[:5]}, unexpected {unexpected[:5]}")


def _barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
