"""python -m benchmarks.efficiency --modality image|audio|text [--minutes 10] [--size demo|base] [section.key=value ...]

Trains data2vec 2.0 and its baseline for the same time on the same data, by `python -m pretrain`, probes both on their
way, and tells and draws quality against training time. The two take turns, by stopping and continuing, so that a shared
machine's moods meet both. The same command continues.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.curves import CLOCKS, FIGURES, Curve, as_tree, draw, equal_quality, read_lines, table, told
from benchmarks.step import ROOT, hardware, rounded
from finetune.trials import Stops, TrialFailed
from models.baselines.config import DATA2VEC2
from models.objectives import network
from pretrain.checkpoint import CheckpointError, latest
from pretrain.config import Config, batch_plan, load
from pretrain.data.sources import DataError
from pretrain.files import write_atomically
from pretrain.parallel import World
from pretrain.probe import Probe
from pretrain.progress import Progress
from pretrain.runtime import EXIT_BAD_INPUT, EXIT_RESUME
from pretrain.settings import ConfigError

PRESETS = {  # objective -> preset, ours first
    ("image", "demo"): {DATA2VEC2: "image_demo", "mae": "image_mae_demo"},
    ("audio", "demo"): {DATA2VEC2: "audio_demo", "wav2vec2": "audio_wav2vec2_demo"},
    ("text", "demo"): {DATA2VEC2: "text_demo", "mlm": "text_mlm_demo"},
    ("image", "base"): {DATA2VEC2: "image_base", "mae": "mae_base"},
    ("audio", "base"): {DATA2VEC2: "audio_base", "wav2vec2": "wav2vec2_base"},
    ("text", "base"): {DATA2VEC2: "text_base", "mlm": "roberta_base"},
}
DATA = {  # of the demos
    "image": ["data.path=fetch:fashion_mnist"],
    "audio": [],
    "text": ["probe.path=data/movie_reviews"],
}
LEAST = 6  # steps that tell what a step takes, the first two of a start left out
LOGGED = 3.0  # seconds of training behind a line of figures


@dataclass(frozen=True)
class Arm:
    """One of the two trainings."""

    objective: str
    preset: str
    given: list[str]
    folder: Path

    def line(self, *more: str) -> list[str]:
        return [
            str(ROOT / "configs" / "pretrain" / f"{self.preset}.yaml"),
            *self.given,
            f"run.dir={self.folder}",
            *more,
        ]

    def config(self, *more: str) -> Config:
        path, *overrides = self.line(*more)
        return load(path, overrides)

    def trained(self, clock: str) -> float:
        """Seconds of training so far, as they passed."""
        seconds, before = 0.0, 0.0
        for line in read_lines(self.folder / "speed.jsonl"):
            seconds += (line["step"] - before) * line[CLOCKS[clock]]
            before = line["step"]
        return seconds

    def done(self, steps: int) -> bool:
        newest = latest(self.folder / "checkpoints")
        return newest is not None and newest.name == f"step_{steps:08d}"


class Turns:
    """Runs one arm at a time until it has had enough, or the run is over."""

    def __init__(self, stops: Stops, log: Path) -> None:
        self.stops, self.log = stops, log

    def take(self, arm: Arm, overrides: list[str], enough: Any) -> None:
        """Raises TrialFailed, in one line, if the run ends otherwise, or somebody asked to stop."""
        self.stops.refuse(arm.folder)
        with self.log.open("ab") as log:
            start = log.tell()
            command = [sys.executable, "-m", "pretrain", *arm.line(*overrides)]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            self.stops.running = process
            asked = False
            while process.poll() is None:
                if not asked and enough():
                    process.send_signal(signal.SIGUSR1)
                    asked = True
                time.sleep(0.1)
            self.stops.running = None
        if self.stops.received:  # maybe before the run could save, which loses a turn at most
            raise TrialFailed(arm.folder, EXIT_RESUME, "was asked to stop")
        if (status := process.returncode) not in (0, EXIT_RESUME):
            said = self.log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
            raise TrialFailed(arm.folder, status, f"ended with status {status}: {said[-1] if said else 'no word'}")


def calibrate(arm: Arm, turns: Turns, seconds: float, clock: str) -> float:
    """Seconds of the clock that a step takes."""
    trial = Arm(arm.objective, arm.preset, arm.given, arm.folder.parent / "calibration" / arm.objective)

    def lines() -> list[float]:
        return [line[CLOCKS[clock]] for line in read_lines(trial.folder / "speed.jsonl")[2:]]

    turns.take(trial, ["run.log_every=1", "probe.every=0"], lambda: len(lines()) >= LEAST and sum(lines()) >= seconds)
    return median(lines())


def planned(arm: Arm, per_step: float, seconds: float, points: int) -> dict[str, Any]:
    """Settings of a run that takes so long, its schedules in the preset's proportions."""
    config, steps = arm.config(), max(points, round(seconds / per_step))
    share = steps / config.train.steps
    steps -= steps % points  # the last probe is of the last step
    settings: dict[str, Any] = {
        "train.steps": steps,
        "optim.warmup_steps": round(config.optim.warmup_steps * share),
        "ema.anneal_steps": round(config.ema.anneal_steps * share),
        "probe.every": steps // points,
        "probe.share": 1.0,
        "run.log_every": max(1, round(LOGGED / per_step)),
        "run.save_every": steps,
        "watch.after_steps": round(config.watch.after_steps * share),
    }
    if arm.objective == "wav2vec2":
        start, least, factor = config.model.wav2vec2.temperature
        settings["model.wav2vec2.temperature"] = [start, least, factor ** (1 / share)]
    return settings


def make_plan(arms: list[Arm], turns: Turns, asked: dict[str, Any], file: Path) -> dict[str, Any]:
    """What is to be run: as it was planned when this benchmark began, or anew. Raises ConfigError if another began."""
    if file.exists():
        plan = json.loads(file.read_text())
        if plan["asked"] != asked:
            changed = [key for key in asked if plan["asked"].get(key) != asked[key]]
            raise ConfigError(
                f"{file.parent} holds another benchmark ({', '.join(changed)} differ); give --out another"
            )
        return plan
    plan = {"asked": asked, "settings": {}}
    for arm in arms:
        print(f"calibrating {arm.objective}", flush=True)
        per_step = calibrate(arm, turns, asked["calibrate"], asked["clock"])
        plan["settings"][arm.objective] = planned(arm, per_step, 60 * asked["minutes"], asked["points"])
    write_atomically(file, json.dumps(plan, indent=1) + "\n")
    return plan


def train(arms: list[Arm], plan: dict[str, Any], turns: Turns, slice_seconds: float) -> None:
    """Both to their ends, in turns: always the one that has had less."""
    steps = {arm.objective: plan["settings"][arm.objective]["train.steps"] for arm in arms}
    clock = plan["asked"]["clock"]
    total = round(60 * plan["asked"]["minutes"]) * len(arms)
    with Progress("efficiency: seconds of training", total) as progress:
        while left := [arm for arm in arms if not arm.done(steps[arm.objective])]:
            arm = min(left, key=lambda arm: arm.trained(clock))
            had = arm.trained(clock)
            settings = as_overrides(plan["settings"][arm.objective])
            turns.take(arm, settings, partial(lambda arm, had: arm.trained(clock) - had >= slice_seconds, arm, had))
            progress.advance(max(0, min(round(arm.trained(clock) - had), total - progress.done)))


def untrained(arm: Arm, settings: list[str]) -> dict[str, float]:
    """What probes find in the network before its first step."""
    config = arm.config(*settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.train.seed)
    model = network(config.model).to(device)
    return Probe(config, model, batch_plan(config.train, 1), World(0, 1, device), print)(0)


def as_overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def report(arms: list[Arm], plan: dict[str, Any], out: Path, title: str) -> str:
    """Writes figures, table and picture; what is said of them."""
    curves = {a.objective: Curve.of(a.folder, plan["settings"][a.objective]["train.steps"]) for a in arms}
    ours, other = curves.values()
    baseline = arms[1].objective
    equal = {figure: {clock: equal_quality(ours, other, figure, clock) for clock in CLOCKS} for figure in FIGURES}
    sentences = [
        sentence
        for figure, name in FIGURES.items()
        for clock in CLOCKS
        for sentence in told(equal[figure][clock], baseline, name, clock)
    ]
    before = {arm.objective: untrained(arm, as_overrides(plan["settings"][arm.objective])) for arm in arms}
    text = "\n".join([table(curves, before), "", *sentences])
    found = {
        "command": shlex.join(["python", "-m", "benchmarks.efficiency", *sys.argv[1:]]),
        "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        **plan,
        "curves": {name: as_tree(curve) for name, curve in curves.items()},
        "untrained": before,
        "equal_quality": equal,
    }
    write_atomically(out / "efficiency.json", json.dumps(rounded(found), indent=1) + "\n")
    write_atomically(out / "table.txt", text + "\n")
    draw(curves, before, out / "efficiency.png", title, plan["asked"]["clock"])
    return text


def shared_out(overrides: list[str], objective: str, known: list[str]) -> list[str]:
    """Those of [OBJECTIVE:]section.key=value that are for one of the arms."""
    found = []
    for override in overrides:
        owner, colon, rest = override.partition(":")
        mine = colon and owner in known
        if not mine or owner == objective:
            found.append(rest if mine else override)
    return found


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.efficiency", description="data2vec 2.0 and a baseline, equally long.")
    parser.add_argument("overrides", nargs="*", metavar="[OBJECTIVE:]section.key=value")
    parser.add_argument("--modality", choices=list(DATA), required=True)
    parser.add_argument("--size", choices=("demo", "base"), default="demo", help="base: on a GPU, with data.path")
    parser.add_argument("--minutes", type=float, default=10, help="of training, for each (default 10)")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="seconds",
        help="what --minutes counts (processor_seconds: on a machine that others use; of all threads together)",
    )
    parser.add_argument("--points", type=int, default=10, help="probes of each (default 10)")
    parser.add_argument(
        "--slice", type=float, default=60, metavar="SECONDS", help="of training, of a turn (default 60)"
    )
    parser.add_argument("--calibrate", type=float, default=15, metavar="SECONDS", help="to find what a step takes")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default runs/efficiency_MODALITY_SIZE")
    args = parser.parse_intermixed_args()
    out = args.out or Path("runs") / f"efficiency_{args.modality}_{args.size}"
    presets = PRESETS[args.modality, args.size]
    data = DATA[args.modality] if args.size == "demo" else []
    asked = {
        key: getattr(args, key) for key in ("modality", "size", "minutes", "clock", "points", "calibrate", "overrides")
    }
    arms = [
        Arm(
            objective,
            preset,
            ["data.workers=0", *data, *shared_out(args.overrides, objective, list(presets))],
            out / objective,
        )
        for objective, preset in presets.items()
    ]
    try:
        if args.points < 1 or not min(args.minutes, args.slice, args.calibrate) > 0:
            raise ConfigError("--points must be at least 1, --minutes, --slice and --calibrate positive")
        for arm in arms:
            if not arm.config().data.path:
                raise ConfigError(f"--size {args.size} needs data.path=, and labels there or at probe.path=")
        out.mkdir(parents=True, exist_ok=True)
        with Stops() as stops:
            turns = Turns(stops, out / "log.txt")
            plan = make_plan(arms, turns, asked, out / "plan.json")
            train(arms, plan, turns, args.slice)
        print(report(arms, plan, out, f"{args.modality}: {' and '.join(presets.values())}"))
    except (ConfigError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except TrialFailed as error:
        print(f"stopped: {error}; the same command continues", file=sys.stderr)
        return error.status
    print(f"figures, table and picture: {out}/efficiency.json, table.txt, efficiency.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
