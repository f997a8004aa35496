"""Fine-tunes on several text tasks with several rates and seeds, and takes each task's best rate, as GLUE is reported.

python -m finetune.sweep CONFIG... --lr 1e-5 2e-5 4e-5 6e-5 [--seeds 5] [--out FOLDER] [section.key=value ...]

Every trial is a run of `python -m finetune` in FOLDER/CONFIG/lrRATE_seedSEED. The same command continues where it
ended, also with more rates or seeds. FOLDER/sweep.json has the figures of all trials, FOLDER/sweep.md the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from finetune.config import GLUE, load
from finetune.trials import Figures, Stops, TrialFailed, run_trials
from pretrain.checkpoint import CheckpointError
from pretrain.data.sources import DataError
from pretrain.files import write_atomically
from pretrain.runtime import EXIT_BAD_INPUT
from pretrain.settings import ConfigError

BEST = "best/"  # what figures of a trial's best checkpoint begin with


@dataclass(frozen=True)
class Choice:
    """A task's best rate, by the median over seeds of its score: the mean of all figures of a trial's best checkpoint.
    `figures` are medians, too, of that rate's trials; `medians` the scores of every rate."""

    task: str
    lr: str
    score: float
    figures: Figures
    medians: dict[str, float]
    trials: dict[str, Figures]


def sweep(
    configs: Sequence[str],
    rates: Sequence[float],
    seeds: int,
    out: Path,
    overrides: Sequence[str] = (),
    tidy: bool = False,
) -> list[Choice]:
    """Runs what has not been run yet, and writes both files behind each trial. `tidy`: of trials with other rates than
    the best, the checkpoints are removed once a task's trials are done.

    Raises ConfigError, CheckpointError or DataError, in one line, before the first trial starts, and TrialFailed.
    """
    tasks = {config: task_of(config, overrides) for config in configs}
    folders = [Path(config).stem for config in configs]
    if len(set(folders)) < len(configs):
        raise ConfigError(f"configs should have different names: {', '.join(folders)}")
    settings = {f"lr{lr:g}_seed{seed}": (lr, seed) for lr in rates for seed in range(1, seeds + 1)}
    trials = {name: [*overrides, f"optim.lr={lr}", f"train.seed={seed}"] for name, (lr, seed) in settings.items()}
    out.mkdir(parents=True, exist_ok=True)
    chosen: list[Choice] = []
    with Stops() as stops:
        for config, folder in zip(configs, folders, strict=True):

            def tell(found: dict[str, Figures], config: str = config) -> None:
                write(out, [*chosen, choose(tasks[config], found)])

            found = run_trials(config, trials, out / folder, tell, stops)
            chosen.append(choose(tasks[config], found))
            for name in trials if tidy else ():
                if rate_of(name) != chosen[-1].lr:
                    shutil.rmtree(out / folder / name / "checkpoints", ignore_errors=True)
    write(out, chosen)
    return chosen


def task_of(config: str, overrides: Sequence[str]) -> str:
    """The name that the table has for a config. Raises ConfigError or CheckpointError if it is not of a text task."""
    loaded = load(config, overrides)
    if loaded.task != "text":
        raise ConfigError(
            f"{config} has task={loaded.task}; a sweep is of text tasks, all of whose figures should be high"
        )
    return loaded.text.task or Path(config).stem


def rate_of(name: str) -> str:
    return name.removeprefix("lr").rpartition("_seed")[0]


def choose(task: str, trials: dict[str, Figures]) -> Choice:
    """Of the trials' rates the one with the greatest median score; the first of equals."""
    scored: dict[str, list[Figures]] = {}
    for name, figures in trials.items():
        own = {figure.removeprefix(BEST): value for figure, value in figures.items() if figure.startswith(BEST)}
        scored.setdefault(rate_of(name), []).append({k: v for k, v in own.items() if "/" in k})
    medians = {lr: float(np.median([np.mean(list(f.values())) for f in found])) for lr, found in scored.items()}
    lr = max(medians, key=lambda rate: medians[rate])
    figures = {name: float(np.median([found[name] for found in scored[lr]])) for name in scored[lr][0]}
    return Choice(task, lr, medians[lr], figures, medians, trials)


def table(chosen: Sequence[Choice]) -> str:
    """In percent, as Markdown."""
    lines = ["| task | best lr | median over seeds | score | trials |", "|---|---|---|---|---|"]
    for choice in chosen:
        figures = ", ".join(f"{name} {100 * value:.1f}" for name, value in choice.figures.items())
        lines.append(f"| {choice.task} | {choice.lr} | {figures} | {100 * choice.score:.1f} | {len(choice.trials)} |")
    names = {choice.task for choice in chosen}
    average = "GLUE average" if names == set(GLUE) else f"average of {len(chosen)}"
    lines.append(f"| {average} | | | {100 * float(np.mean([choice.score for choice in chosen])):.1f} | |")
    return "\n".join(lines)


def write(out: Path, chosen: Sequence[Choice]) -> None:
    write_atomically(out / "sweep.json", json.dumps([asdict(choice) for choice in chosen], indent=1) + "\n")
    write_atomically(out / "sweep.md", table(chosen) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        "finetune.sweep", description="Fine-tune on text tasks with the best of some rates."
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAMLs of configs/finetune/")
    parser.add_argument("--lr", nargs="+", required=True, metavar="RATE", help="the peak rates to try")
    parser.add_argument("--seeds", type=int, default=1, help="trials of each rate, with seeds from 1 (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--tidy", action="store_true", help="remove the checkpoints of rates that are not the best")
    args = parser.parse_intermixed_args()
    given = [*args.configs, *args.lr]  # an override may stand behind either
    try:
        rates = [positive(rate) for rate in args.lr if "=" not in rate]
        if args.seeds < 1:
            raise ConfigError(f"--seeds {args.seeds} should be 1 or more")
        overrides = [word for word in given if "=" in word]
        configs = [word for word in args.configs if "=" not in word]
        print(table(sweep(configs, rates, args.seeds, args.out, overrides, args.tidy)))
        print(f"written to {args.out / 'sweep.json'} and {args.out / 'sweep.md'}")
    except (ConfigError, CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except TrialFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


def positive(rate: str) -> float:
    try:
        if (value := float(rate)) > 0:
            return value
    except ValueError:
        pass
    raise ConfigError(f"--lr {rate!r} is no positive number")


if __name__ == "__main__":
    sys.exit(main())
