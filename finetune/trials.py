"""Fine-tuning runs that differ in a few settings, one after the other, each in a process and a folder of its own."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from finetune.config import Config, load
from pretrain.checkpoint import CheckpointError, differences
from pretrain.files import write_atomically
from pretrain.runtime import EXIT_RESUME, STOP_SIGNALS
from pretrain.saved import find
from pretrain.settings import build

Figures = dict[str, float]  # last/SPLIT/FIGURE of the last evaluation, best/SPLIT/FIGURE of the best checkpoint's
DONE = "trial.json"  # in the folder of a trial that has come to its end


class TrialFailed(RuntimeError):
    """A trial ended before its end; `status` is its exit status. The same command continues it."""

    def __init__(self, folder: Path, status: int, why: str = "") -> None:
        super().__init__(f"the trial in {folder} {why or f'ended with status {status}'}")
        self.status = status


def run_trials(
    config: str,
    trials: dict[str, list[str]],
    folder: Path,
    after: Callable[[dict[str, Figures]], None] | None = None,
    stops: Stops | None = None,
) -> dict[str, Figures]:
    """Runs `python -m finetune config OVERRIDES` for each name -> overrides, in `folder`/name, and returns what their
    evaluations found, by name. Finished ones are not run again; `after` is told of those so far, behind each new one.
    `stops`: the caller's, open, where these are not all that it runs.

    Raises ConfigError or CheckpointError, in one line, before the first starts, and TrialFailed.
    """
    lines = {name: [config, *overrides, f"run.dir={folder / name}"] for name, overrides in trials.items()}
    configs = {name: load(line[0], line[1:]) for name, line in lines.items()}
    found = {name: figures for name in trials if (figures := finished(folder / name, configs[name])) is not None}
    with nullcontext(stops) if stops else Stops() as asked:
        for number, (name, line) in enumerate(lines.items(), 1):
            if name not in found:
                asked.refuse(folder / name)
                print(f"trial {number} of {len(trials)}: {name}", flush=True)
                if status := asked.finetune(line):
                    raise TrialFailed(folder / name, status)
                found[name] = read_figures(folder / name)
                record = {"figures": found[name], "settings": dataclasses.asdict(configs[name])}
                write_atomically(folder / name / DONE, json.dumps(record, indent=1) + "\n")
                if after:
                    after({name: found[name] for name in trials if name in found})
    return {name: found[name] for name in trials}


def finished(folder: Path, config: Config) -> Figures | None:
    """What the trial in `folder` has found; None if it has not come to its end. Raises CheckpointError if it was
    another trial."""
    try:
        record = json.loads((folder / DONE).read_text())
    except FileNotFoundError:
        return None
    if changed := differences(build(Config, record["settings"], source=str(folder / DONE)), config):
        raise CheckpointError(
            f"{folder} holds a trial with other settings ({'; '.join(changed[:4])}); choose another folder, or delete "
            "that one"
        )
    return record["figures"]


def read_figures(run: Path) -> Figures:
    """Of a run's eval.jsonl, the last line and that of the best checkpoint."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    best = find(run, best=True).step
    chosen = {"last": lines[-1], "best": next(line for line in lines if line["step"] == best)}
    return {f"{which}/{name}": value for which, line in chosen.items() for name, value in line.items()}


class Stops:
    """Hands the signals that ask to stop to the trial that runs; from one on, none starts."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        self.running: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stops:
        self._previous = {number: signal.signal(number, self._hand) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hand(self, number: int, _: FrameType | None) -> None:
        self.received.add(number)
        if self.running:
            self.running.send_signal(number)

    def refuse(self, folder: Path) -> None:
        """Raises TrialFailed, before the trial in `folder` is to start, if there was one."""
        if self.received:
            raise TrialFailed(folder, EXIT_RESUME, "was not started, for a signal has asked to stop")

    def finetune(self, arguments: list[str]) -> int:
        """The exit status of `python -m finetune`. One that a signal ends, because it is still starting, is continued
        as one that has saved."""
        self.running = subprocess.Popen([sys.executable, "-m", "finetune", *arguments])
        for number in tuple(self.received):  # before there was anyone to hand it to
            self.running.send_signal(number)
        status = self.running.wait()
        self.running = None
        return EXIT_RESUME if -status in self.received else status
