"""The life of a run, whatever it trains: claim the folder, resume, step, measure, evaluate, save, stop."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from pretrain import checkpoint, full
from pretrain.checkpoint import RunState
from pretrain.config import BatchPlan, Settings
from pretrain.data.loader import Dataset
from pretrain.data.sources import DataError
from pretrain.engine import StepResult, loss_scale
from pretrain.files import hold, write_atomically
from pretrain.fingerprint import data, require_agreement, streams
from pretrain.full import Full
from pretrain.metrics import Recorder
from pretrain.parallel import World
from pretrain.runtime import EXIT_RESUME, StopRequest
from pretrain.settings import ConfigError, build, read_tree, to_yaml
from pretrain.watchdog import Watchdog

TOLERATED = 10  # undecodable files that do not stop a run whose share of them is still a small number's noise


class Diverged(RuntimeError):
    """Loss or gradient are no longer finite, or the targets have collapsed."""


class Trains(Protocol):
    """A model under its engine, and one optimizer step."""

    engine: Any  # deepspeed.DeepSpeedEngine
    teacher: Any  # pretrain.ema.ShardedTeacher, or None
    plan: BatchPlan
    state: RunState

    def step(self, micro_batches: list[Any]) -> tuple[Any, StepResult]:
        """Over this rank's share of a global batch -> sums over it, whose `failures` are files, and what came of it."""

    def measure(self, sums: Any, result: StepResult) -> dict[str, float]:
        """The step's figures over the global batch, `loss`, `lr` and `grad_norm` among them. Collective; this is where
        the host waits for the device."""


class Evaluation(Protocol):
    """What is measured now and then beside the training. Collective, and the same on all ranks."""

    def due(self, step: int) -> bool: ...

    def __call__(self, step: int) -> dict[str, float]: ...

    def score(self, found: dict[str, float]) -> float | None:
        """The greater, the better; None: nothing is to be chosen by it."""


class Job(Protocol):
    """One kind of training: how its parts are built. They raise ConfigError, DataError or CheckpointError."""

    world: World

    @property
    def views(self) -> int:
        """How many views of a sample a step learns from."""

    @property
    def config(self) -> Settings: ...

    def open(self) -> Dataset: ...

    def build(self, weights: Full | None) -> Trains:
        """`weights` to start from, if the run has none of its own."""

    def batches(self, dataset: Any, trainer: Any) -> Generator[Any, None, None]:
        """This rank's micro-batches from `trainer.state` on."""

    def evaluation(self, dataset: Any, trainer: Any, note: Callable[[str], None]) -> Evaluation | None:
        """`note` takes lines for the log."""

    def assets(self, dataset: Any) -> dict[str, bytes]:
        """Files, by name, that the weights mean nothing without; the run folder keeps them."""

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Raises Diverged, in one line, if training is not to go on."""

    def told(self, metrics: dict[str, float]) -> str:
        """What of the metrics belongs on the screen, beside loss, rate and norm; two spaces behind each."""


def run(job: Job) -> int:
    """Runs a job to its end, resuming by itself; returns the exit status.

    Raises ConfigError, DataError, CheckpointError or Diverged, each with one clear line.
    """
    config, world = job.config, job.world
    peers = world.peers
    folder = Path(config.run.dir)
    checkpoints = folder / "checkpoints"
    held = claim(folder) if world.is_main else None
    newest = checkpoint.latest(checkpoints)
    if newest:
        refuse_other_experiment(newest, config)
    dataset = job.open()
    found = {"path": str(newest)}
    common = {"data": data(dataset), "random numbers": streams(config.train.seed), "newest checkpoint": found}
    require_agreement(peers, common)
    start = full.read(config.train.init_from) if config.train.init_from and not newest else None
    trainer = job.build(start)
    if newest:
        trainer.state = checkpoint.load(newest, trainer.engine, trainer.teacher, world)
    state, steps = trainer.state, config.train.steps
    if state.samples not in (0, len(dataset)):
        raise ConfigError(
            f"data.path={config.data.path} has {len(dataset)} samples, this run began with {state.samples}; give it "
            "the same data, or another run.dir"
        )
    state.samples = len(dataset)
    recorder = Recorder(folder, config, state.step, state.read, world.is_main, job.told, job.views)
    if world.is_main:
        write_atomically(folder / "config.yaml", to_yaml(config))
        keep_assets(folder, job.assets(dataset))
    recorder.say(f"run folder {folder}: " + (f"resuming after step {state.step}" if newest else "starting"))
    if start:
        recorder.say(f"weights: {config.train.init_from}, step {start.step}")
    for note in dataset.notes:
        recorder.say(f"data: {note}")
    evaluation = job.evaluation(dataset, trainer, recorder.note)
    watchdog = Watchdog(config.watch, folder, peers, recorder.say)
    stop = StopRequest(world)
    batches = job.batches(dataset, trainer)
    norms = Norms()
    saved = state.step

    def save(best: bool) -> None:
        watchdog.other(f"the checkpoint after step {state.step}")
        path = checkpoint.save(checkpoints, trainer.engine, trainer.teacher, state, config, world, best)
        recorder.note(f"saved {path}")

    try:
        missed = world.as_main(bool(newest) and recorder.evaluated_last != state.step)
        if missed and evaluation and evaluation.due(state.step):  # it was left at a signal
            watchdog.other(f"the evaluation after step {state.step}")
            if evaluate(evaluation, state, recorder):
                save(best=True)
        while state.step < steps:
            watchdog.step(state.step + 1)
            sums, result = trainer.step([next(batches) for _ in range(trainer.plan.accumulation)])
            for failure in sums.failures:
                recorder.note(f"could not decode {failure}")
            if config.train.precision != "fp16" or loss_scale(trainer.engine) <= 1:
                norms.add(state.step + (not result.applied), result.grad_norm)
            stopping = stop.agreed()
            leaving = stopping and state.step < steps  # at once: what is due is evaluated when the run continues
            evaluating = bool(evaluation and result.applied and not leaving and evaluation.due(state.step))
            logging = state.step % config.run.log_every == 0 or state.step == steps
            saving = state.step > saved and (stopping or state.step % config.run.save_every == 0 or state.step == steps)
            norms.check(wait=logging or saving or evaluating or leaving)
            if result.applied and (logging or saving or evaluating):
                metrics = trainer.measure(sums, result)
                read, failures = world.sum(torch.tensor([state.read, state.failures], device=world.device)).tolist()
                watch(config, state.step, metrics, read, failures)  # before it is saved, or even written down
                job.check(state.step, metrics)
                if logging:
                    recorder.record(state.step, metrics, read)
            best = False
            if evaluation and evaluating:
                watchdog.other(f"the evaluation after step {state.step}")
                best = evaluate(evaluation, state, recorder)
            if saving or best:
                save(best)
                saved = state.step
            if leaving:
                name = stop.received.name if stop.received else "a signal on another rank"
                recorder.say(
                    f"{name}: saved after step {state.step}; the same command continues (exit status {EXIT_RESUME})"
                )
                return EXIT_RESUME
        stop.settle()
        recorder.say(f"finished {steps} steps; checkpoint {checkpoint.latest(checkpoints)}")
        return 0
    except Diverged as error:
        raise Diverged(f"{error} {last_good(checkpoints)}") from None
    finally:
        watchdog.close()
        if held:
            held.close()
        batches.close()
        stop.close()
        recorder.close()


class Norms:
    """Gradient norms on their way from the device, for which nobody waits until something is to be saved or told."""

    def __init__(self) -> None:
        self._coming: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, norm: Tensor) -> None:
        arrived = None
        if norm.is_cuda:
            norm, arrived = norm.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._coming.append((step, norm, arrived))

    def check(self, wait: bool) -> None:
        """Raises Diverged if one that has come is not finite; with `wait`, all come."""
        while self._coming:
            step, norm, arrived = self._coming[0]
            if arrived is not None and wait:
                arrived.synchronize()
            if arrived is not None and not arrived.query():
                return
            if not norm.isfinite():
                raise Diverged(f"step {step}: the gradient is not finite ({float(norm)}); it was not applied.")
            self._coming.popleft()


def evaluate(evaluation: Evaluation, state: RunState, recorder: Recorder) -> bool:
    """Evaluates after a step, writes down what is found, and whether it is the best so far."""
    began, processor = time.monotonic(), time.process_time()
    found = evaluation(state.step)
    recorder.evaluated(state.step, found, time.monotonic() - began, time.process_time() - processor)
    score = evaluation.score(found)
    if score is None or (state.best is not None and score <= state.best):
        return False
    state.best = score
    return True


def watch(config: Settings, step: int, metrics: dict[str, float], read: int, failures: int) -> None:
    """Stops a run that has gone to infinity, or cannot read its data: `failures` of `read` samples."""
    if not math.isfinite(metrics["loss"]):
        raise Diverged(f"step {step}: the loss is {metrics['loss']}.")
    if metrics["grad_norm"] > config.watch.max_grad_norm > 0:
        raise Diverged(
            f"step {step}: the gradient norm {metrics['grad_norm']:.4g} is over watch.max_grad_norm="
            f"{config.watch.max_grad_norm}."
        )
    if metrics.get("loss_scale", math.inf) < config.watch.min_loss_scale:
        raise Diverged(
            f"step {step}: the loss scale {metrics['loss_scale']:.4g} is under watch.min_loss_scale="
            f"{config.watch.min_loss_scale}."
        )
    share = config.data.max_failed_share
    if failures > max(share * read, TOLERATED if share else 0):
        raise DataError(
            f"{failures} files of {read} read could not be decoded, more than "
            f"data.max_failed_share={share}; their names are in the run's log.txt"
        )


def claim(folder: Path) -> IO[bytes]:
    """Makes the run folder this process's own while what is returned is open. Raises ConfigError if another run has it
    or it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return hold(folder / ".lock")
    except BlockingIOError:
        raise ConfigError(f"another run is using run.dir={folder}; end it first, or give this one its own") from None
    except OSError as error:
        raise ConfigError(f"run.dir={folder}: {error.strerror}") from None


def keep_assets(folder: Path, assets: dict[str, bytes]) -> None:
    """Keeps the files that the weights mean nothing without; a run that began with others is refused."""
    for name, content in assets.items():
        kept = folder / name
        if not kept.exists():
            write_atomically(kept, content)
        elif kept.read_bytes() != content:
            raise ConfigError(f"{name} is not the one that {folder} began with; give data.path its own data")


def last_good(checkpoints: Path) -> str:
    newest = checkpoint.latest(checkpoints)
    return f"The last good checkpoint is {newest}" if newest else "There is no checkpoint yet"


def refuse_other_experiment(newest: Path, config: Settings) -> None:
    """A run folder continues the experiment that it holds, or nothing."""
    file = newest / "config.yaml"
    tree = read_tree(file)
    if ("task" in tree) != hasattr(config, "task"):
        kind = "fine-tuning" if "task" in tree else "pre-training"
        raise ConfigError(f"{newest.parent.parent} holds a run of {kind}; choose another run.dir")
    changed = checkpoint.differences(build(type(config), tree, source=str(file)), config)
    if changed:
        raise ConfigError(
            f"{newest.parent.parent} holds a run with other settings ({'; '.join(changed[:4])}); choose "
            "another run.dir, or delete that one"
        )
