"""Builds a run and runs it: batch -> engine -> optimizer -> teacher -> metrics -> checkpoint."""

from __future__ import annotations

import filecmp
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import deepspeed
import numpy as np
import torch
from torch import Tensor

from models.config import LossConfig
from models.data2vec import Batch, Data2Vec, Output
from models.masks import row_keys
from models.targets import Moments, deviation, pool
from pretrain import checkpoint
from pretrain.checkpoint import RunState
from pretrain.config import BatchPlan, Config, batch_plan, load
from pretrain.data.loader import Dataset, build_dataset, build_loader
from pretrain.data.sources import DataError
from pretrain.ema import ShardedTeacher
from pretrain.engine import StepResult, build_engine, loss_scale, optimizer_step
from pretrain.files import hold, write_atomically
from pretrain.fingerprint import data, require_agreement, streams
from pretrain.metrics import Recorder
from pretrain.optim import ema_decay, learning_rate, set_hyperparameters
from pretrain.parallel import World
from pretrain.runtime import EXIT_RESUME, StopRequest
from pretrain.settings import ConfigError, to_yaml
from pretrain.watchdog import Watchdog

TOLERATED = 10  # undecodable files that do not stop a run whose share of them is still a small number's noise


class Diverged(RuntimeError):
    """Loss or gradient are no longer finite, or the targets have collapsed."""


@dataclass
class StepSums:
    """Sums over the micro-batches of one step, on the device; nothing waits for them until they are read."""

    loss: Tensor
    prediction: Moments | None = None
    target: Moments | None = None
    samples: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, batch: Batch, loss: Tensor, output: Output) -> None:
        self.samples += len(batch.inputs)
        self.failures += batch.failures
        self.loss += loss.detach().float()
        self.prediction = pool(self.prediction, output.prediction) if self.prediction else output.prediction
        self.target = pool(self.target, output.target) if self.target else output.target


def objective(output: Output, loss: LossConfig, masked: Tensor | int, rows: Tensor | int) -> Tensor:
    """This micro-batch's part of the global loss: parts add up over micro-batches and ranks (docs/method.md 1.6).

    `masked` and `rows` count the *global* batch: its hidden positions, and its samples times masks.
    """
    return output.regression / masked + loss.cls * loss.cls_rows / rows * output.cls


def micro_step_seed(seed: int, batch: int, micro_step: int) -> int:
    """What layer drop is drawn from, the same on all ranks, and, the rank added, dropout: pure in its arguments."""
    key = row_keys(seed, np.array([batch]), np.array([micro_step]), 1)
    return int(key[0] >> np.uint64(2))


class Trainer:
    """Model, engine, teacher and position of one run; `weights` is a state dict to start from."""

    def __init__(self, config: Config, world: World, weights: dict[str, Tensor] | None = None) -> None:
        self.config, self.world = config, world
        self.plan: BatchPlan = batch_plan(config.train, world.size)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.model = Data2Vec(config.model)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.engine: deepspeed.DeepSpeedEngine = build_engine(self.model, config, self.plan, world)
        self.teacher = ShardedTeacher(self.engine, self.model)
        self.state = RunState()

    def step(self, micro_batches: list[Batch]) -> tuple[StepSums, StepResult]:
        """One optimizer step over this rank's share of a global batch, and the teacher's update after it."""
        config, world, state = self.config, self.world, self.state
        counts = sum(b.masked for b in micro_batches), sum(len(b.ids_mask) for b in micro_batches)
        masked, rows = world.sum(torch.stack([torch.full((), n, device=world.device) for n in counts]))
        set_hyperparameters(
            self.engine.optimizer,
            learning_rate(state.step, config.optim, config.train.steps),
            state.step + 1,
            config.optim,
        )
        sums = StepSums(torch.zeros((), device=world.device))
        for i, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(i + 1 == len(micro_batches))
            seed = micro_step_seed(config.train.seed, state.batches, i)
            torch.manual_seed(seed + world.data_rank)  # dropout's, on every device
            output: Output = self.engine(batch.to(world.device), seed)
            loss = objective(output, config.model.loss, masked, rows)
            # The engine averages over ranks and micro-batches; the parts of the global loss are to be summed.
            self.engine.backward(loss * (world.data_ranks * self.plan.accumulation))
            sums.add(batch, loss, output)
        result = optimizer_step(self.engine)
        state.batches += 1
        state.read += sums.samples
        state.failures += len(sums.failures)
        if result.applied:
            state.step += 1
            self.teacher.update(ema_decay(state.step, config.ema))
        return sums, result

    def measure(self, sums: StepSums, result: StepResult) -> dict[str, float]:
        """The step's figures over the global batch. Collective; this is where the host waits for the device."""
        config, step = self.config, self.state.step
        assert sums.prediction and sums.target
        metrics = {
            "loss": float(self.world.sum(sums.loss)),
            "grad_norm": result.grad_norm,
            "target_deviation": float(deviation(self._pooled(sums.target))),
            "prediction_deviation": float(deviation(self._pooled(sums.prediction))),
            "lr": learning_rate(step - 1, config.optim, config.train.steps),
            "ema_decay": ema_decay(step, config.ema),
        }
        if config.train.precision == "fp16":
            metrics["loss_scale"] = loss_scale(self.engine)
        return metrics

    def _pooled(self, own: Moments) -> Moments:
        """Moments over all ranks."""
        if self.world.data_ranks == 1:
            return own
        n = self.world.sum(own.n.clone())
        mean = self.world.sum(own.mean * own.n) / n
        m2 = self.world.sum(own.m2 + own.n * (own.mean - mean) ** 2)
        return Moments(n, mean, m2)


def train(config: Config, world: World) -> int:
    """Runs `config` to its end, resuming by itself; returns the exit status.

    Raises ConfigError, DataError, CheckpointError or Diverged, each with one clear line.
    """
    peers = world.peers
    folder = Path(config.run.dir)
    checkpoints = folder / "checkpoints"
    held = claim(folder) if world.is_main else None
    newest = checkpoint.latest(checkpoints)
    if newest:
        refuse_other_experiment(newest, config)
    dataset = build_dataset(config, progress=world.is_main)
    found = {"path": str(newest)}
    common = {"data": data(dataset), "random numbers": streams(config.train.seed), "newest checkpoint": found}
    require_agreement(peers, common)
    trainer = Trainer(config, world)
    if newest:
        trainer.state = checkpoint.load(newest, trainer.engine, trainer.teacher, world)
    state, steps = trainer.state, config.train.steps
    if state.samples not in (0, len(dataset)):
        raise ConfigError(
            f"data.path={config.data.path} has {len(dataset)} samples, this run began with {state.samples}; give it "
            "the same data, or another run.dir"
        )
    state.samples = len(dataset)
    recorder = Recorder(folder, config, state.step, state.read, world.is_main)
    if world.is_main:
        write_atomically(folder / "config.yaml", to_yaml(config))
        keep_assets(folder, dataset)
    recorder.say(f"run folder {folder}: " + (f"resuming after step {state.step}" if newest else "starting"))
    for note in dataset.notes:
        recorder.say(f"data: {note}")
    watchdog = Watchdog(config.watch, folder, peers, recorder.say)
    stop = StopRequest(world)
    batches = build_loader(dataset, config, trainer.plan, world, state.batches)
    saved = state.step
    try:
        while state.step < steps:
            watchdog.step(state.step + 1)
            sums, result = trainer.step([next(batches) for _ in range(trainer.plan.accumulation)])
            for failure in sums.failures:
                recorder.note(f"could not decode {failure}")
            if not result.applied and (config.train.precision != "fp16" or loss_scale(trainer.engine) <= 1):
                raise Diverged(
                    f"step {state.step + 1}: the gradient is not finite ({result.grad_norm}); nothing was updated."
                )
            stopping = stop.agreed()
            logging = state.step % config.run.log_every == 0 or state.step == steps
            saving = state.step > saved and (stopping or state.step % config.run.save_every == 0 or state.step == steps)
            if result.applied and (logging or saving):
                metrics = trainer.measure(sums, result)
                read, failures = world.sum(torch.tensor([state.read, state.failures], device=world.device)).tolist()
                watch(config, state.step, metrics, read, failures)  # before it is saved, or even written down
                if logging:
                    recorder.record(state.step, metrics, read)
            if saving:
                watchdog.other(f"the checkpoint after step {state.step}")
                path = checkpoint.save(checkpoints, trainer.engine, trainer.teacher, state, config, world)
                recorder.note(f"saved {path}")
                saved = state.step
            if stopping and state.step < steps:
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


def watch(config: Config, step: int, metrics: dict[str, float], read: int, failures: int) -> None:
    """Stops a run that has collapsed, gone to infinity, or cannot read its data: `failures` of `read` samples."""
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
    if step > config.watch.after_steps:
        for key, least in (
            ("target_deviation", config.watch.min_target_deviation),
            ("prediction_deviation", config.watch.min_prediction_deviation),
        ):
            if metrics[key] < least:
                raise Diverged(f"step {step}: collapse, {key} {metrics[key]:.4g} is under watch.min_{key}={least}.")
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


def keep_assets(folder: Path, dataset: Dataset) -> None:
    """Copies of the files that the data mean nothing without; a run that began with others is refused."""
    for asset in dataset.assets:
        kept = folder / asset.name
        if not kept.exists():
            shutil.copyfile(asset, kept)
        elif not filecmp.cmp(asset, kept, shallow=False):
            raise ConfigError(f"{asset} is not the {asset.name} that this run began with; give data.path its own data")


def last_good(checkpoints: Path) -> str:
    newest = checkpoint.latest(checkpoints)
    return f"The last good checkpoint is {newest}" if newest else "There is no checkpoint yet"


def refuse_other_experiment(newest: Path, config: Config) -> None:
    """A run folder continues the experiment that it holds, or nothing."""
    changed = checkpoint.differences(load(newest / "config.yaml"), config)
    if changed:
        raise ConfigError(
            f"{newest.parent.parent} holds a run with other settings ({'; '.join(changed[:4])}); choose "
            "another run.dir, or delete that one"
        )
