"""The panels of the report's picture, each drawn into axes of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from finetune.features import FrozenEncoder, extract, stack_pixels
from finetune.probe import DRAWS, METHOD_NAMES, METHODS, PIXELS, PRETRAINED, UNTRAINED, Labels, ProbeTable
from models.data2vec import Batch
from pretrain.config import Config
from pretrain.data.collate import Collate
from pretrain.data.image import ImageDataset

Picture = NDArray[np.float64]  # (H, W, 3) in [0, 1]

INK, MUTED, LINE, HIDDEN = "#1B2733", "#6B7885", "#D5DBE1", (0.84, 0.86, 0.88)
BLUE, ORANGE, GREY, GREEN, RED = "#0B6BB0", "#E08A00", "#A3ADB8", "#009E73", "#D55E00"
ROW_COLOURS = {PRETRAINED: BLUE, UNTRAINED: GREY, PIXELS: ORANGE}
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

ROWS, NEIGHBOURS, MASKS_SHOWN = 6, 6, 4  # of tiles in the lower panels; neighbours and masks beside each image
PCA_IMAGES = 500


@dataclass(frozen=True)
class Shown:
    """The images that the picture is made of: queries, and a gallery that their neighbours come from."""

    queries: ImageDataset
    gallery: ImageDataset
    query_ids: list[int]
    gallery_ids: list[int]
    query_y: Labels | None
    gallery_y: Labels | None
    classes: list[str]


def read_metrics(path: Path) -> dict[str, NDArray[np.float64]]:
    """Columns of metrics.jsonl; empty if there is none. A last line torn by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    names = ("step", "loss", "target_deviation", "prediction_deviation")
    return {name: np.array([line[name] for line in lines], float) for name in names}


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of a window of some 1/25 of the curve around each point, narrower towards the ends."""
    at = np.arange(len(values))
    reach = np.minimum(len(values) // 50, np.minimum(at, at[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def draw_loss(axes: Axes, metrics: dict[str, NDArray[np.float64]]) -> None:
    titled(axes, "Loss", "mean over the hidden patches of a step's batch")
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


def draw_deviations(axes: Axes, metrics: dict[str, NDArray[np.float64]], config: Config) -> None:
    titled(axes, "Deviation of targets and predictions", "near 0, all patches would look alike: collapse")
    steps = metrics["step"]
    marker = "o" if len(steps) <= 12 else None
    for name, colour, least in (
        ("target", INK, config.watch.min_target_deviation),
        ("prediction", BLUE, config.watch.min_prediction_deviation),
    ):
        axes.plot(steps, metrics[f"{name}_deviation"], color=colour, lw=2, label=name, marker=marker, ms=3.5)
        if least:
            axes.axhline(least, color=colour, lw=1, ls=":")
    highest = max(metrics[f"{name}_deviation"].max(initial=0) for name in ("target", "prediction"))
    axes.set_ylim(0, max(1.1, 1.1 * highest))
    axes.legend(loc="lower right", ncols=2, handlelength=1.4)
    _steps(axes)


def draw_table(figure: Figure, place: SubplotSpec, table: ProbeTable) -> None:
    """Two groups of bars on one scale: kNN and linear probe, by number of labels."""
    grid = place.subgridspec(1, 2, wspace=0.06)
    first: Axes | None = None
    counts, width = table.counts, 0.27
    for i, method in enumerate(METHODS):
        axes = figure.add_subplot(grid[i], sharey=first)
        for j, (row, colour) in enumerate(ROW_COLOURS.items()):
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
                    fontsize=8,
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


def draw_masks(axes: Axes, shown: Shown, pixels: torch.Tensor, config: Config) -> None:
    """Each input and some of its masked views, drawn by the very code that feeds training (epoch 0)."""
    count = min(MASKS_SHOWN, config.model.num_masks)
    samples = [shown.queries[0, i] for i in shown.query_ids[: len(pixels)]]
    batch: Batch = Collate(config.model, config.train.seed)(samples)
    hidden = torch.zeros(len(batch.ids_mask), config.model.positions, dtype=torch.bool)
    hidden.scatter_(1, batch.ids_mask, True)
    grid = hidden.view(len(samples), config.model.num_masks, *config.model.grid_shape).numpy()
    patch = config.model.image.patch
    for row, image in enumerate(as_pictures(pixels)):
        _tile(axes, image, 0, row)
        for m in range(count):
            greyed = image.copy()
            greyed[np.kron(grid[row, m], np.ones((patch, patch), bool))] = HIDDEN
            _tile(axes, greyed, 1.25 + m, row)
    share = len(batch.ids_mask[0]) / config.model.positions
    _panel(
        axes,
        "The task",
        f"{count} of {config.model.num_masks} views of each image; the hidden {100 * share:.0f} % are to be predicted",
        1.25 + count,
        len(samples),
    )


def draw_neighbours(axes: Axes, shown: Shown, pixels: torch.Tensor, encoder: FrozenEncoder) -> None:
    """Queries and their nearest gallery images by cosine of the centred pooled features."""
    keys = extract(encoder, shown.gallery, label="features for the picture", indices=shown.gallery_ids)
    queries = np.concatenate([encoder(part).cpu().numpy() for part in pixels.split(64)])
    centre = keys.mean(axis=0)
    cosine = normalize(queries - centre) @ normalize(keys - centre).T
    if shown.queries is shown.gallery:
        cosine[np.asarray(shown.query_ids[: len(pixels)])[:, None] == np.asarray(shown.gallery_ids)] = -2
    nearest = np.argsort(-cosine, axis=1)[:, :NEIGHBOURS]
    for row, (image, near) in enumerate(zip(as_pictures(pixels), nearest, strict=True)):
        _tile(axes, image, 0, row)
        found = stack_pixels([shown.gallery[0, shown.gallery_ids[i]] for i in near])
        for column, (picture, i) in enumerate(zip(as_pictures(found), near, strict=True)):
            same = None
            if shown.query_y is not None and shown.gallery_y is not None:
                same = bool(shown.gallery_y[i] == shown.query_y[row])
            _tile(axes, picture, 1.25 + column, row, same)
    kind = "training" if shown.queries is shown.gallery else "test"
    sub = f"a {kind} image; nearest of {len(keys):,} training images"
    _panel(axes, "What the teacher finds alike", sub, 1.25 + nearest.shape[1], len(pixels))
    if shown.query_y is not None:
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


def draw_components(axes: Axes, shown: Shown, pixels: torch.Tensor, encoder: FrozenEncoder) -> None:
    """The first three principal components of patch features as red, green and blue, one scale for all images."""
    fit = stack_pixels([shown.gallery[0, i] for i in shown.gallery_ids[:PCA_IMAGES]])
    patches = torch.cat([encoder.features(part).positions.cpu() for part in fit.split(64)]).numpy()
    mean = patches.mean(axis=0)  # of each position: what is left is what the image adds to its place
    model = PCA(3, random_state=0).fit((patches - mean).reshape(-1, patches.shape[-1]))
    low, high = np.percentile(model.transform((patches - mean).reshape(-1, patches.shape[-1])), (2, 98), axis=0)
    own = encoder.features(pixels).positions.cpu().numpy() - mean
    colours = (model.transform(own.reshape(-1, own.shape[-1])) - low) / np.maximum(high - low, 1e-9)
    colours = colours.clip(0, 1).reshape(len(pixels), *encoder.config.grid_shape, 3)
    for row, (image, colour) in enumerate(zip(as_pictures(pixels), colours, strict=True)):
        x, y = 2.3 * (row // ROWS), row % ROWS
        _tile(axes, image, x, y)
        _tile(axes, colour, x + 1, y)
    share = 100 * model.explained_variance_ratio_.sum()
    _panel(axes, "What patches are made of", f"3 components ({share:.0f} % of variance) as RGB", 4.3, ROWS)


def as_pictures(pixels: torch.Tensor) -> list[Picture]:
    """uint8 (B, C, H, W) -> B arrays (H, W, 3) in [0, 1]."""
    return list((pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).double() / 255).numpy())


def _tile(axes: Axes, image: Picture, x: float, row: int, same: bool | None = None) -> None:
    """One image in the unit square at column x; `same` puts a coloured frame and a mark on it."""
    gap = 0.04
    box = (x + gap, x + 1 - gap, row + 1 - gap, row + gap)
    axes.imshow(image, extent=box, interpolation="nearest", vmin=0, vmax=1)
    colour = LINE if same is None else GREEN if same else RED
    side = 1 - 2 * gap
    axes.add_patch(Rectangle((x + gap, row + gap), side, side, fill=False, ec=colour, lw=0.8 if same is None else 2.2))
    if same is not None:
        axes.text(
            x + 0.86,
            row + 0.15,
            "✓" if same else "✗",
            color="white",
            ha="center",
            va="center",
            fontsize=7.5,
            fontweight="bold",
            bbox={"boxstyle": "square,pad=0.18", "fc": colour, "ec": "none"},
        )


def _panel(axes: Axes, title: str, sub: str, columns: float, rows: int) -> None:
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_aspect("equal", anchor="NW")
    axes.set_axis_off()
    titled(axes, title, sub)


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
