"""Checkpoints that survive a kill at any moment.

    checkpoints/
        step_00001000/      shard_*.safetensors a rank, state.json, config.yaml
        best                the name of the one that an evaluation liked most, where there are evaluations
        latest              the name of the newest complete one, moved last

A checkpoint is written beside, as `.partial-*`, made durable, renamed, and only then pointed to. What the shards hold,
`pretrain.pieces` says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from pretrain import pieces
from pretrain.config import RunConfig, Settings
from pretrain.ema import ShardedTeacher
from pretrain.files import flush, write_atomically
from pretrain.parallel import World
from pretrain.settings import flat, to_yaml

LATEST, BEST = "latest", "best"
PARTIAL = ".partial-"
REPLACED = ".replaced-"  # a checkpoint whose step is saved again, until the new one is there
PACKING = "train.micro_batch"  # of samples that differ in length it decides which of them meet
# What may change between a run and its continuation.
FREE = (
    "run.",
    "watch.",
    "probe.",
    "data.workers",
    "data.path",
    "speech.held_out",
    "data.max_failed_share",
    "data.image.max_pixels",
    "train.threads",
    PACKING,
    "train.deepspeed",
    "train.tensor_parallel",
    "train.init_from",
    "train.kernels.",
    "train.recompute",
    "train.compile",
)
DAMAGED = (OSError, RuntimeError, KeyError, ValueError, EOFError, AssertionError, SafetensorError)


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
    best: float | None = None  # of the evaluations so far, where one can be better than another


def save(
    folder: Path,
    engine: deepspeed.DeepSpeedEngine,
    teacher: ShardedTeacher | None,
    state: RunState,
    config: Settings,
    world: World,
    best: bool = False,
) -> Path:
    """Writes the checkpoint of `state.step` and moves the pointer to it; that to the `best`, too, which stays.
    Collective: every rank calls it."""
    name = f"step_{state.step:08d}"
    read, failures = world.sum(torch.tensor([state.read, state.failures], device=world.device)).tolist()
    partial, final = folder / (PARTIAL + name), folder / name

    def clear() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write_shard() -> None:
        owned = [*pieces.optimizer_pieces(engine), *(teacher.pieces if teacher else [])]
        if not engine.zero_optimization():  # all data-parallel peers hold the same: each writes its share
            owned = [piece.share(world.data_rank, world.data_ranks) for piece in owned]
        if world.tensor_rank:  # what is whole on tensor-parallel peers, the first of them writes
            owned = [piece for piece in owned if piece.split]
        pieces.write(pieces.file(partial, world.rank), owned)
        flush(pieces.file(partial, world.rank))

    def publish() -> None:
        meta = asdict(state) | {
            "read": read,
            "failures": failures,
            "ranks": world.size,
            "tensor_parallel": world.tensor_ranks,
            "zero_stage": engine.zero_optimization_stage(),
            "precision": config.train.precision,
            "loss_scaler": scaler_state(engine),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        }
        (partial / "state.json").write_text(json.dumps(meta, indent=2) + "\n")
        (partial / "config.yaml").write_text(to_yaml(config))
        for file in (partial / "state.json", partial / "config.yaml", partial):
            flush(file)
        if final.exists():  # the same step, saved before; `latest` may point to it, and finds it aside
            shutil.rmtree(folder / (REPLACED + name), ignore_errors=True)
            final.rename(folder / (REPLACED + name))
        partial.rename(final)
        flush(folder)
        if best:
            write_atomically(folder / BEST, name + "\n")
        write_atomically(folder / LATEST, name + "\n")
        prune(folder, name, config.run)

    try:
        for work, everyone in ((clear, False), (write_shard, True), (publish, False)):
            _together(work if everyone or world.is_main else None, partial, world)
    except CheckpointError:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # what it fills the disk with
        raise
    return final


def _together(work: Callable[[], None] | None, path: Path, world: World) -> None:
    """Does this rank's part of the work, if it has one; raises CheckpointError on all ranks if one cannot write."""
    problem = ""
    try:
        if work:
            work()
    except (OSError, SafetensorError) as error:
        problem = f"cannot write {path} on rank {world.rank}: {_reason(error)}; nothing older is lost"
    raise_everywhere(problem, world)


def latest(folder: Path, pointer: str = LATEST) -> Path | None:
    """The checkpoint that a pointer names, the newest, or None if there is none yet. CheckpointError if it leads
    nowhere."""
    try:
        name = (folder / pointer).read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    newest = folder / name
    if not newest.exists() and (folder / (REPLACED + name)).exists():  # killed while another took its place
        newest = folder / (REPLACED + name)
    if not (newest / "state.json").is_file():
        there = ", ".join(path.name for path in sorted(folder.glob("step_*")))
        told = (
            f"these are: {there}; write one of them into it" if there else "there is no other: delete it to start anew"
        )
        raise CheckpointError(f"{folder / pointer} names {newest.name}, which is not there; {told}")
    return newest


def load(path: Path, engine: deepspeed.DeepSpeedEngine, teacher: ShardedTeacher | None, world: World) -> RunState:
    """Restores everything, whatever the ranks, the ZeRO stage and the tensor parallelism it was written with.

    Raises CheckpointError, on all ranks, if it does not fit, is damaged or of an older format.
    """
    try:
        meta = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no complete checkpoint: {error}") from None
    problem = ""
    try:
        layout = (world.size, world.tensor_ranks, engine.zero_optimization_stage())
        alike = (meta["ranks"], meta["tensor_parallel"], meta["zero_stage"]) == layout
        wanted = [*pieces.optimizer_pieces(engine), *(teacher.pieces if teacher else [])]
        every = own = [pieces.file(path, rank) for rank in range(meta["ranks"])]
        if alike and engine.zero_optimization():
            own = [pieces.file(path, rank) for rank in {world.rank, world.rank - world.tensor_rank}]
        try:
            pieces.read(own, wanted)
        except (
            RuntimeError
        ):  # other settings in the DeepSpeed JSON, or another DeepSpeed, may have it laid out otherwise
            pieces.read(every, wanted)
        pieces.set_steps(engine, meta["step"])
        restore_scaler(engine, meta["loss_scaler"])
    except DAMAGED as error:
        problem = (
            f"{path} is damaged, or of an older format ({_reason(error)}); write the name of an older one into latest"
        )
    raise_everywhere(problem, world)
    pieces.publish_masters(engine)
    if teacher:
        teacher.publish()
    read, failures = (meta["read"], meta["failures"]) if world.data_rank == 0 else (0, 0)
    return RunState(meta["step"], meta["batches"], read, failures, meta["samples"], meta.get("best"))


def start_from(
    engine: deepspeed.DeepSpeedEngine, teacher: ShardedTeacher | None, tensors: Mapping[str, Tensor]
) -> None:
    """Weights of whole tensors, by the names of the engine's module; in fp32, whatever the forward pass reads. The rest
    of the state is a new run's. Collective."""
    pieces.fill(pieces.master_pieces(engine), {f"{pieces.MASTER}/{name}": tensor for name, tensor in tensors.items()})
    pieces.publish_masters(engine)
    if teacher:
        own = {n.removeprefix("teacher."): t for n, t in tensors.items() if n.startswith("teacher.")}
        pieces.fill(teacher.pieces, {f"{pieces.TEACHER}/{name}": tensor for name, tensor in own.items()})
        teacher.publish()


def raise_everywhere(problem: str, world: World) -> None:
    """Raises CheckpointError on all ranks, with the first one's words, if one has a problem: none waits for it."""
    problems = [problem]
    if world.size > 1:
        problems = [""] * world.size
        dist.all_gather_object(problems, problem)
    if any(problems):
        raise CheckpointError(next(filter(None, problems)))


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def prune(folder: Path, newest: str, run: RunConfig) -> None:
    """Deletes what neither keep_last nor keep_every holds on to, what a kill left half-written, and what lies after
    `newest`: the future of a run that went on from an earlier step."""
    for rubbish in (*folder.glob(PARTIAL + "*"), *folder.glob(REPLACED + "*")):
        shutil.rmtree(rubbish, ignore_errors=True)
    for pointer in (LATEST, BEST):
        for beside in folder.glob(f".{pointer}.*"):
            beside.unlink(missing_ok=True)
    saved = sorted(folder.glob("step_*"))
    past = [path for path in saved if path.name <= newest]
    every = [p for p in past if run.keep_every and int(p.name.removeprefix("step_")) % run.keep_every == 0]
    best = [path for path in past if (folder / BEST).is_file() and path.name == (folder / BEST).read_text().strip()]
    for path in set(saved) - set(past[-run.keep_last :]) - set(every) - set(best):
        # Renamed first, so that a kill in between leaves rubbish, not a checkpoint that looks whole.
        rubbish = path.rename(folder / (PARTIAL + path.name))
        shutil.rmtree(rubbish, ignore_errors=True)


def differences(old: Settings, new: Settings) -> list[str]:
    """Settings of the two that differ, as "key: old -> new"; where a run lives and how often it speaks aside."""
    before, after = flat(old), flat(new)
    free = FREE if new.model.sample_size == 1 else tuple(k for k in FREE if k != PACKING)
    return [f"{k}: {before[k]} -> {after[k]}" for k in after if before[k] != after[k] and not k.startswith(free)]


def scaler_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """Of fp16's dynamic loss scale; empty otherwise."""
    scaler = _scaler(engine)
    return {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)} if scaler else {}


def restore_scaler(engine: deepspeed.DeepSpeedEngine, state: dict[str, float]) -> None:
    for name, value in state.items():
        setattr(_scaler(engine), name, value)


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler(engine: deepspeed.DeepSpeedEngine) -> Any:
    if not engine.fp16_enabled():
        return None
    return engine.optimizer.loss_scaler if engine.zero_optimization() else engine.optimizer.loss_scale_config
