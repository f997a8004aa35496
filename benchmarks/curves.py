"""Quality against training time, of runs that have been probed on their way; and the times to equal quality."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from finetune.panels import BLUE, ORANGE, STYLE
from pretrain.files import replacing

CLOCKS = {"seconds": "seconds_per_step", "processor_seconds": "processor_seconds_per_step"}
FIGURES = {"probe/linear": "linear probe", "probe/knn": "nearest neighbours"}


@dataclass(frozen=True)
class Curve:
    """One run: what a step takes, and at each probe, by step, time on either clock and what was found."""

    steps: int
    per_step: dict[str, float]
    points: list[dict[str, float]]

    @classmethod
    def of(cls, run: Path, steps: int) -> Curve:
        """Training time is steps times the median of `speed.jsonl`, so that starts, stops, probes, and a neighbour's
        short burst on a shared machine, do not count."""
        speed = read_lines(run / "speed.jsonl")
        per_step = {clock: median(line[key] for line in speed) for clock, key in CLOCKS.items()}
        points = [
            {clock: line["step"] * seconds for clock, seconds in per_step.items()} | line
            for line in read_lines(run / "eval.jsonl")
        ]
        return cls(steps, per_step, points)

    def best(self, figure: str) -> dict[str, float]:
        """The first point of the highest value."""
        return max(self.points, key=lambda point: point[figure])

    def time_to(self, level: float, figure: str, clock: str) -> float | None:
        """When a line through the points first reaches the level: None if it never does, the first point's time if it
        begins above."""
        before: dict[str, float] | None = None
        for point in self.points:
            if point[figure] >= level:
                if before is None:
                    return point[clock]
                share = (level - before[figure]) / (point[figure] - before[figure])
                return before[clock] + share * (point[clock] - before[clock])
            before = point
        return None


def read_lines(path: Path) -> list[dict[str, float]]:
    """Of a run's .jsonl, but for a last line that is being written."""
    try:
        lines = path.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def equal_quality(ours: Curve, other: Curve, figure: str, clock: str) -> dict[str, float | None]:
    """Both directions: when either is at its best, and when the other reached as much. `speedup` is the other's time
    over ours, to the other's best; `speedup_to_ours` to ours. None: it was not reached."""
    best, own = other.best(figure), ours.best(figure)
    to_best, to_own = ours.time_to(best[figure], figure, clock), other.time_to(own[figure], figure, clock)
    return {
        "best_of_baseline": best[figure],
        "baseline_at_best": best[clock],
        "data2vec2_to_baselines_best": to_best,
        "speedup": best[clock] / to_best if to_best else None,
        "best_of_data2vec2": own[figure],
        "data2vec2_at_best": own[clock],
        "baseline_to_data2vec2s_best": to_own,
        "speedup_to_ours": to_own / own[clock] if to_own else None,
    }


def told(equal: Mapping[str, float | None], baseline: str, name: str, clock: str) -> list[str]:
    """The same in sentences, times in minutes."""
    unit = "min" if clock == "seconds" else "min of processor"

    def sentence(who: str, whose: str, level: str, at: str, reached: str, ratio: str) -> str:
        best, time = equal[level], equal[at]
        assert best is not None and time is not None
        start = f"{name}: {who} reaches {whose}'s best, {100 * best:.1f}% after {time / 60:.2f} {unit},"
        found, speedup = equal[reached], equal[ratio]
        if found is None or speedup is None:
            return f"{start} at no time"
        return f"{start} after {found / 60:.2f}; {baseline}'s time / data2vec2's: {speedup:.2f}"

    to_best = ("best_of_baseline", "baseline_at_best", "data2vec2_to_baselines_best", "speedup")
    to_ours = ("best_of_data2vec2", "data2vec2_at_best", "baseline_to_data2vec2s_best", "speedup_to_ours")
    return [sentence("data2vec2", baseline, *to_best), sentence(baseline, "data2vec2", *to_ours)]


def table(curves: Mapping[str, Curve], untrained: Mapping[str, Mapping[str, float]]) -> str:
    """A row a probe, the first of each before any training."""
    head = f"{'objective':<12}{'step':>8}{'min':>9}{'min of processor':>18}" + "".join(
        f"{n:>20}" for n in FIGURES.values()
    )
    rows = [
        f"{name:<12}{point['step']:>8}{point['seconds'] / 60:>9.2f}{point['processor_seconds'] / 60:>18.2f}"
        + "".join(f"{100 * point[figure]:>20.1f}" for figure in FIGURES)
        for name, curve in curves.items()
        for point in [dict.fromkeys(("step", *CLOCKS), 0) | dict(untrained[name]), *curve.points]
    ]
    return "\n".join([head, "-" * len(head), *rows])


def draw(
    curves: Mapping[str, Curve], untrained: Mapping[str, Mapping[str, float]], path: Path, title: str, clock: str
) -> None:
    """A panel a figure; a line a run, and a dashed one where it was before any training."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        for axes, (key, name) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
            for (objective, curve), colour in zip(curves.items(), (BLUE, ORANGE), strict=True):
                values = [100 * point[key] for point in curve.points]
                axes.plot(minutes(curve, clock), values, color=colour, marker="o", ms=4, label=objective)
                axes.axhline(100 * untrained[objective][key], color=colour, ls="--", lw=1, label="untrained")
            axes.set_xscale("log", subs=[])
            axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_title(name)
            axes.set_xlabel("minutes of training" if clock == "seconds" else "minutes of processor")
        first = figure.axes[0]
        first.set_ylabel("test samples told right, %")
        first.legend()
        figure.suptitle(title)
        with replacing(path) as beside:
            figure.savefig(beside, format="png", dpi=150)


def minutes(curve: Curve, clock: str) -> Sequence[float]:
    return [point[clock] / 60 for point in curve.points]


def as_tree(curve: Curve) -> dict[str, Any]:
    per_step = {CLOCKS[clock]: seconds for clock, seconds in curve.per_step.items()}
    return {"steps": curve.steps} | per_step | {"points": curve.points}
