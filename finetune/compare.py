"""Does pre-training help? Fine-tunes with few and with more labels, from a pre-trained encoder and from scratch.

python -m finetune.compare CONFIG [section.key=value ...] --labels 100 1000 all --seeds 3

All else is equal: labels, steps, seeds. Settings may follow the amount of labels or the start:
--override 100:train.steps=300 --override scratch:optim.lr=1e-3. Each training has its folder in runs/compare_CONFIG (or
--out), where it is not run again once finished; compare.json, table.txt and compare.png there say what came out, by the
first figure of an evaluation or by --figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from finetune.config import Config, load
from finetune.panels import BLUE, GREY, STYLE
from finetune.trials import Figures, TrialFailed, run_trials
from pretrain import full
from pretrain.checkpoint import CheckpointError
from pretrain.files import replacing, write_atomically
from pretrain.runtime import EXIT_BAD_INPUT
from pretrain.settings import ConfigError, to_tree

PRETRAINED, SCRATCH = ARMS = ("pre-trained", "scratch")
KINDS = ("labels", "minutes")
PLAIN = ("loss",)  # figures that are shown as they are; others are shares, shown as percentages
ALL = "all"


@dataclass(frozen=True)
class Comparison:
    """`figures[arm][amount]` has, for each seed so far, what the last evaluation found, by SPLIT/FIGURE."""

    kind: str  # of amount: labels or minutes
    amounts: list[str]
    figures: dict[str, dict[str, list[Figures]]]
    figure: str = ""  # the one that is compared; empty: the first

    @property
    def judged(self) -> str:
        """SPLIT/FIGURE, of the first split. Raises ConfigError if not all trainings have it."""
        every = [found for arm in self.figures.values() for trials in arm.values() for found in trials]
        known = [name for name in every[0] if all(name in found for found in every)]
        wanted = f"{known[0].partition('/')[0]}/{self.figure}" if self.figure else known[0]
        if wanted not in known:
            names = ", ".join(name.partition("/")[2] for name in known)
            raise ConfigError(f"--figure {self.figure}: what all evaluations have is {names}")
        return wanted

    @property
    def scale(self) -> int:
        return 1 if self.judged.rpartition("/")[2] in PLAIN else 100

    @property
    def unit(self) -> str:
        return f"{self.judged} x 100" if self.scale == 100 else self.judged

    def spread(self, arm: str, amount: str) -> tuple[float, float] | None:
        """Mean and deviation over seeds, times `scale`; None where no training is finished."""
        values = [self.scale * found[self.judged] for found in self.figures[arm][amount]]
        return (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None

    def cell(self, arm: str, amount: str) -> str:
        found, count = self.spread(arm, amount), len(self.figures[arm][amount])
        if not found:
            return "-"
        shown = [f"{value:.{1 if self.scale == 100 else 3}f}" for value in found]
        return " ± ".join(shown) if count > 1 else shown[0]

    def __str__(self) -> str:
        width, cell = max(map(len, (self.kind, *ARMS))), 14
        seeds = max(len(found) for arm in self.figures.values() for found in arm.values())
        lines = [
            f"{self.unit}, mean ± deviation over {seeds} seeds",
            f"{self.kind:<{width}}" + "".join(f"{amount:>{cell}}" for amount in self.amounts),
            "-" * (width + cell * len(self.amounts)),
            *(f"{arm:<{width}}" + "".join(f"{self.cell(arm, n):>{cell}}" for n in self.amounts) for arm in ARMS),
        ]
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Quality against labels, both arms with their deviations."""
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(6, 4), layout="constrained")
            axes = figure.subplots()
            for arm, colour in zip(ARMS, (BLUE, GREY), strict=True):
                shown = [(i, s) for i, amount in enumerate(self.amounts) if (s := self.spread(arm, amount))]
                if shown:
                    places, spreads = zip(*shown, strict=True)
                    means, deviations = zip(*spreads, strict=True)
                    axes.errorbar(places, means, deviations, color=colour, marker="o", capsize=4, label=arm)
            axes.set_xticks(range(len(self.amounts)), self.amounts)
            axes.set_xlim(-0.3, len(self.amounts) - 0.7)
            axes.set_xlabel(self.kind)
            axes.set_ylabel(self.unit)
            axes.legend()
            with replacing(path) as beside:
                figure.savefig(beside, format="png", dpi=150)


def overrides(config: Config, kind: str, arm: str, amount: str, seed: int, folder: Path) -> list[str]:
    """What makes a trial of the config, whose model the scratch has, too."""
    size = "null" if amount == ALL else amount
    settings = [f"data.{kind}={size}", f"train.seed={seed}"]
    if arm == SCRATCH:
        settings += ["train.init_from=''", f"model={json.dumps(to_tree(config.model))}"]
        settings += [f"text.tokenizer={path}" for path in sorted(folder.glob("start/*"))]
    return settings


def keep_tokenizer(config: Config, folder: Path) -> None:
    """Copies what texts are read with out of the pre-trained model, for those who begin without it."""
    for name, content in full.read(config.train.init_from).assets.items():
        if name != full.LABELS:
            (folder / "start").mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "start" / name, content)


def compare(
    path: str, given: list[str], kind: str, amounts: list[str], seeds: int, own: list[str], out: Path, figure: str = ""
) -> None:
    """Runs what is not finished of both arms, for every amount and seed. Raises ConfigError, CheckpointError or
    TrialFailed."""
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds} should be 1 or more")
    config = load(path, given)
    if not config.train.init_from:
        raise ConfigError(
            f"{path} starts from nothing: give train.init_from, a pre-trained run, to compare with scratch"
        )
    special = [special_settings(text, amounts) for text in own]
    if config.task == "text":
        keep_tokenizer(config, out)
    trials: dict[str, list[str]] = {}
    for amount in amounts:
        for seed in range(1, seeds + 1):
            for arm in ARMS:
                chosen = [setting for key, setting in special if key in (arm, amount, f"{arm},{amount}")]
                trials[name(arm, amount, seed)] = [*given, *overrides(config, kind, arm, amount, seed, out), *chosen]

    def tell(found: dict[str, Figures]) -> None:
        split = f"last/{config.eval.splits[0]}/"
        figures: dict[str, dict[str, list[Figures]]] = {
            arm: {
                amount: [
                    {key.removeprefix("last/"): value for key, value in found[trial].items() if key.startswith(split)}
                    for seed in range(1, seeds + 1)
                    if (trial := name(arm, amount, seed)) in found
                ]
                for amount in amounts
            }
            for arm in ARMS
        }
        table = Comparison(kind, amounts, figures, figure)
        print(f"\n{table}\n", flush=True)
        write_atomically(out / "table.txt", f"{table}\n")
        write_atomically(out / "compare.json", json.dumps({"kind": kind, "figures": figures}, indent=1) + "\n")
        table.draw(out / "compare.png")

    tell(run_trials(path, trials, out, tell))


def name(arm: str, amount: str, seed: int) -> str:
    return f"{arm}_{amount}_seed{seed}"


def special_settings(text: str, amounts: list[str]) -> tuple[str, str]:
    """KEY:SETTING -> both."""
    key, colon, setting = text.partition(":")
    known = [*ARMS, *amounts, *(f"{arm},{amount}" for arm in ARMS for amount in amounts)]
    if not colon or key not in known:
        raise ConfigError(f"--override {text}: write KEY:section.key=value with a KEY of {', '.join(known)}")
    return key, setting


def amount_of(text: str) -> str:
    if text != ALL and float(text) <= 0:
        raise ValueError
    return text


def main() -> int:
    parser = argparse.ArgumentParser("finetune.compare", description="Fine-tuning from pre-trained and from scratch.")
    parser.add_argument("config", help="a YAML of configs/finetune/ with train.init_from")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    amounts = parser.add_mutually_exclusive_group(required=True)
    for kind in KINDS:
        amounts.add_argument(f"--{kind}", nargs="+", type=amount_of, metavar="N", help=f"{kind} to learn from, or all")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each kind (default 3)")
    parser.add_argument("--override", action="append", default=[], metavar="KEY:section.key=value")
    parser.add_argument(
        "--figure", default="", metavar="NAME", help="of the last evaluation of the first split (default: its first)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    args = parser.parse_intermixed_args()
    kind = next(kind for kind in KINDS if getattr(args, kind))
    out = args.out or Path("runs") / f"compare_{Path(args.config).stem}"
    try:
        compare(args.config, args.overrides, kind, getattr(args, kind), args.seeds, args.override, out, args.figure)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except TrialFailed as error:
        print(f"stopped: {error}; the same command continues", file=sys.stderr)
        return error.status
    print(f"table, figures and picture: {out}/table.txt, compare.json, compare.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
