"""The upper panels of the report's picture, and what the lower ones of all modalities share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from sklearn.preprocessing import normalize

from finetune.features import FrozenEncoder, extract
from finetune.probe import DRAWS, METHOD_NAMES, METHODS, PRETRAINED, UNTRAINED, ProbeTable
from pretrain.config import Config
from pretrain.data.collate import Collate
from pretrain.data.sources import Sample
from pretrain.labelled.modality import MODALITIES
from pretrain.labelled.samples import Labels

Picture = NDArray[np.float64]  # (H, W, 3) in [0, 1]

INK, MUTED, LINE, HIDDEN = "#1B2733", "#6B7885", "#D5DBE1", (0.84, 0.86, 0.88)
BLUE, ORANGE, GREY, GREEN, RED = "#0B6BB0", "#E08A00", "#A3ADB8", "#009E73", "#D55E00"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#EDF0F3",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
}

ROWS = 6  # of samples in the lower panels
METRICS = ("step", "loss", "target_deviation", "prediction_deviation")
PROBES = ("step", "probe/knn", "probe/linear")


@dataclass(frozen=True)
class Shown:
    """The samples that the picture is made of: queries, and a gallery that their neighbours come from."""

    queries: Any  # pretrain.labelled.samples.Samples
    gallery: Any
    query_ids: list[int]
    gallery_ids: list[int]
    query_y: Labels | None
    gallery_y: Labels | None
    classes: list[str]

    def query(self, row: int) -> Any:
        return self.queries[0, self.query_ids[row]]

    def found(self, i: int) -> Any:
        """Sample `i` of the gallery."""
        return self.gallery[0, self.gallery_ids[i]]

    def same(self, row: int, i: int) -> bool | None:
        """Whether query and gallery sample are of one class, if that is known."""
        if self.query_y is None or self.gallery_y is None:
            return None
        return bool(self.gallery_y[i] == self.query_y[row])

    @property
    def kind(self) -> str:
        return "training" if self.queries is self.gallery else "test"


def read_metrics(path: Path, names: Sequence[str] = METRICS) -> dict[str, NDArray[np.float64]]:
    """Columns of metrics.jsonl or eval.jsonl; empty if there is none. A last line torn by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return {name: np.array([line[name] for line in lines], float) for name in names}


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of a window of some 1/25 of the curve around each point, narrower towards the ends."""
    at = np.arange(len(values))
    reach = np.minimum(len(values) // 50, np.minimum(at, at[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def draw_loss(axes: Axes, metrics: dict[str, NDArray[np.float64]], config: Config) -> None:
    position = MODALITIES[config.model.modality].position
    titled(axes, "Loss", f"mean over the hidden {position} of a step's batch")
    steps, loss = metrics["step"], metrics["loss"]
    smooth = smoothed(loss)
    axes.plot(steps, loss, color=BLUE, alpha=0.3, lw=1, marker="o" if len(loss) <= 12 else None, ms=3.5)
    axes.plot(steps, smooth, color=BLUE, lw=2)
    if len(loss):
        low, high = loss.min(), loss.max()
        if low > 0 and high > 4 * low:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
        axes.annotate(f"{smooth[-1]:.3g}", (steps[-1], smooth[-1]), (0, 8), color=BLUE, fontweight="bold", **place)
    _steps(axes)


def draw_deviations(
    axes: Axes,
    metrics: dict[str, NDArray[np.float64]],
    config: Config,
    probes: dict[str, NDArray[np.float64]],
) -> None:
    """With the accuracies of the probes that the run has taken, if it has."""
    position = MODALITIES[config.model.modality].position
    titled(axes, "Deviation of targets and predictions", f"near 0, all {position} would look alike: collapse")
    steps = metrics["step"]
    marker = "o" if len(steps) <= 12 else None
    for name, colour, least in (
        ("target", INK, config.watch.min_target_deviation),
        ("prediction", BLUE, config.watch.min_prediction_deviation),
    ):
        axes.plot(steps, metrics[f"{name}_deviation"], color=colour, lw=2, label=name, marker=marker, ms=3.5)
        if least:
            axes.axhline(least, color=colour, lw=1, ls=":")
    if len(probes["step"]):
        for name, colour, label in (("probe/knn", GREEN, "kNN probe"), ("probe/linear", ORANGE, "linear probe")):
            axes.plot(probes["step"], probes[name], color=colour, lw=1.5, ls="--", marker="o", ms=3, label=label)
    highest = max(metrics[f"{name}_deviation"].max(initial=0) for name in ("target", "prediction"))
    axes.set_ylim(0, max(1.1, 1.1 * highest))
    axes.legend(loc="best", ncols=2, handlelength=1.4)
    _steps(axes)


def draw_table(figure: Figure, place: SubplotSpec, table: ProbeTable) -> None:
    """Two groups of bars on one scale: kNN and linear probe, by number of labels."""
    grid = place.subgridspec(1, 2, wspace=0.06)
    first: Axes | None = None
    counts, width = table.counts, 0.27
    colours = {PRETRAINED: BLUE, UNTRAINED: GREY, table.baseline: ORANGE}
    for i, method in enumerate(METHODS):
        axes = figure.add_subplot(grid[i], sharey=first)
        for j, (row, colour) in enumerate(colours.items()):
            values = [table.rows[row][method][c] for c in counts]
            x = np.arange(len(counts)) + (j - 1) * width
            heights = np.array([100 * v.mean for v in values])
            axes.bar(x, heights, width * 0.92, color=colour, label=row)
            axes.errorbar(x, heights, [100 * v.std for v in values], fmt="none", ecolor=INK, elinewidth=0.9)
            for at, v in zip(x, values, strict=True):
                top = 100 * (v.mean + v.std) + 1.5
                axes.text(
                    at,
                    top,
                    f"{100 * v.mean:.1f}",
                    ha="center",
                    fontsize=7.3,
                    color=INK,
                    fontweight="bold" if row == PRETRAINED else "normal",
                )
        axes.set_xticks(
            range(len(counts)), [f"{c} labels" if c != "all" else f"all {table.train_images:,}" for c in counts]
        )
        axes.tick_params(length=0)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 114)
        axes.set_yticks(range(0, 101, 25))
        axes.text(0.02, 1.0, METHOD_NAMES[method], transform=axes.transAxes, fontsize=9, color=MUTED, va="top")
        if first is None:
            spread = f"; whiskers: deviation over {DRAWS} draws of labels" if counts != ["all"] else ""
            titled(axes, "Probes of frozen features", f"test accuracy in %{spread}")
            first = axes
        else:
            axes.tick_params(labelleft=False)
            axes.spines["left"].set_visible(False)
            axes.legend(
                loc="lower right",
                bbox_to_anchor=(1.02, 1.075),
                ncols=3,
                handlelength=0.8,
                handletextpad=0.5,
                fontsize=9,
                columnspacing=1.1,
            )


def hidden(sample: Sample, config: Config) -> NDArray[np.bool_]:
    """(M, *grid) of a sample's masks, True where they hide: drawn by the very code that feeds training."""
    batch = Collate(config.model, config.train.seed)([sample])
    grid = config.model.grid(sample.inputs.shape[-1])
    found = np.zeros((len(batch.ids_mask), int(np.prod(grid))), bool)
    np.put_along_axis(found, batch.ids_mask.numpy(), True, axis=1)
    return found.reshape(len(found), *grid)


def nearest(shown: Shown, encoder: FrozenEncoder, rows: int, count: int) -> NDArray[np.int64]:
    """(rows, count) of the gallery, by cosine of what probes see, centred; no query is its own neighbour."""
    keys = extract(encoder, shown.gallery, label="features for the picture", indices=shown.gallery_ids)
    queries = extract(encoder, shown.queries, indices=shown.query_ids[:rows])
    centre = keys.mean(axis=0)
    cosine = normalize(queries - centre) @ normalize(keys - centre).T
    if shown.queries is shown.gallery:
        cosine[np.asarray(shown.query_ids[: len(queries)])[:, None] == np.asarray(shown.gallery_ids)] = -2
    return np.argsort(-cosine, axis=1)[:, :count]


def mark(axes: Axes, x: float, y: float, same: bool, size: float = 7.5) -> None:
    """A white tick or cross on green or red, centred at (x, y)."""
    axes.text(
        x,
        y,
        "✓" if same else "✗",
        color="white",
        ha="center",
        va="center",
        fontsize=size,
        fontweight="bold",
        bbox={"boxstyle": "square,pad=0.18", "fc": GREEN if same else RED, "ec": "none"},
    )


def explain_marks(axes: Axes) -> None:
    for x, text, colour in ((-92, "✓ same class", GREEN), (0, "✗ another class", RED)):
        axes.annotate(
            text,
            (1, 1),
            (x, 9),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=colour,
            fontweight="bold",
        )


def titled(axes: Axes, title: str, sub: str = "") -> None:
    axes.annotate(
        title,
        (0, 1),
        (0, 24 if sub else 10),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=12,
        fontweight="bold",
    )
    if sub:
        axes.annotate(
            sub, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=MUTED
        )


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step", loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
