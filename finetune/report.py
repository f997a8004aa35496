"""python -m finetune.report RUN: probes a run's newest checkpoint and draws what was learned, as one picture.

Writes report.png (and probe.json, if the data can be probed) into the run folder and says where everything lies.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from finetune.features import Checkpoint, FrozenEncoder, find, load_encoder, stack_pixels
from finetune.panels import (
    BLUE,
    MUTED,
    ROWS,
    STYLE,
    Shown,
    draw_components,
    draw_deviations,
    draw_loss,
    draw_masks,
    draw_neighbours,
    draw_table,
    read_metrics,
    titled,
)
from finetune.probe import NoProbe, ProbeTable, balanced_order, centre_crops, compare, labelled_data
from pretrain.checkpoint import CheckpointError
from pretrain.config import Config, ConfigError
from pretrain.data.fetch import resolve
from pretrain.data.sources import DataError, open_images

TIMES = " \N{MULTIPLICATION SIGN} "
QUERIES = 2 * ROWS  # the second half only in the panel of components
GALLERY = 5000


def choose_images(config: Config) -> tuple[Shown, str]:
    """Test images as queries, one of each class in turn; training images if there are no others. With it, the line
    that says why no probe is possible, or nothing."""
    try:
        data = labelled_data(config)
    except NoProbe as reason:
        images = centre_crops(open_images(resolve(config.data.path), config.data.split), config)
        order = np.random.default_rng(0).permutation(len(images)).tolist()
        shown = Shown(images, images, order[:QUERIES], order[: GALLERY + QUERIES], None, None, [])
        return shown, f"{reason}; the picture shows training images"
    queries, gallery = balanced_order(data.test_y, seed=0)[:QUERIES], balanced_order(data.train_y, seed=0)[:GALLERY]
    return Shown(
        data.test,
        data.train,
        queries.tolist(),
        gallery.tolist(),
        data.test_y[queries],
        data.train_y[gallery],
        data.classes,
    ), ""


def draw(found: Checkpoint, shown: Shown, table: ProbeTable | None, note: str) -> Figure:
    """The whole picture, 1800 x 1200 pixels at 120 dpi."""
    config = found.config
    encoder = load_encoder(found.folder)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(15, 10), facecolor="white")
        _heading(figure, found, encoder)
        top = figure.add_gridspec(1, 3, left=0.045, right=0.975, top=0.838, bottom=0.585, width_ratios=(1, 1, 1.6))
        metrics = read_metrics(found.run / "metrics.jsonl")
        draw_loss(figure.add_subplot(top[0]), metrics)
        draw_deviations(figure.add_subplot(top[1]), metrics, config)
        if table:
            draw_table(figure, top[2], table)
        else:
            axes = figure.add_subplot(top[2])
            axes.set_axis_off()
            titled(axes, "Probes of frozen features")
            axes.text(0, 0.9, textwrap.fill(note, 66), va="top", color=MUTED)
        bottom = figure.add_gridspec(
            1, 3, left=0.02, right=0.985, wspace=0.07, width_ratios=(5.25, 7.25, 4.4), top=0.475, bottom=0.015
        )
        pixels = stack_pixels([shown.queries[0, i] for i in shown.query_ids])
        draw_masks(figure.add_subplot(bottom[0]), shown, pixels[:ROWS], config)
        draw_neighbours(figure.add_subplot(bottom[1]), shown, pixels[:ROWS], encoder)
        draw_components(figure.add_subplot(bottom[2]), shown, pixels, encoder)
    return figure


def _heading(figure: Figure, found: Checkpoint, encoder: FrozenEncoder) -> None:
    config, meta = found.config, json.loads((found.folder / "state.json").read_text())
    model, train = config.model, config.train
    weights = sum(p.numel() for p in encoder.encoder.parameters())
    size = f"{weights / 1e9:.2f} G" if weights >= 1e9 else f"{weights / 1e6:.2f} M"
    patch = f"{model.positions} patches of {model.image.patch}{TIMES}{model.image.patch} pixels"
    facts = [
        f"step {found.step:,} of {train.steps:,}",
        f"{model.prenet_depth + model.depth} blocks of width {model.width}, {size} weights",
        f"{patch}, {100 * model.mask.hidden(model.positions) / model.positions:.0f} % hidden",
        f"{train.batch_size} images{TIMES}{model.num_masks} masks a step",
        f"{meta['ranks']} rank{'s' * (meta['ranks'] > 1)}, ZeRO {meta['zero_stage']}, {meta['precision']}",
    ]
    title = figure.text(0.02, 0.955, "data2vec 2.0", fontsize=21, fontweight="bold", va="baseline")
    end = title.get_window_extent().x1 / figure.bbox.width
    figure.text(end + 0.012, 0.955, found.run.name, fontsize=21, color=BLUE, va="baseline")
    figure.text(0.02, 0.928, "   ·   ".join(facts), fontsize=10.5, color=MUTED, va="center")


def report(path: str | Path) -> Path:
    """Probes (unless done for this step), draws report.png into the run folder, says where things are; its path."""
    found = find(path)
    shown, note = choose_images(found.config)
    table = None if note else probed(found)
    figure = draw(found, shown, table, note)
    picture = found.run / "report.png"
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    print(f"\n{table}\n\n{table.verdict}\n" if table else f"\n{note}\n")
    places = {
        "picture": picture,
        "newest checkpoint": found.folder,
        "config": found.run / "config.yaml",
        "metrics": found.run / "metrics.jsonl",
        "TensorBoard": found.run / "tensorboard",
    }
    for what, where in places.items():
        print(f"{what:<18} {where}")
    return picture


def probed(found: Checkpoint) -> ProbeTable:
    """The run's probe.json if it is of this step's teacher, a new one otherwise."""
    try:
        table = ProbeTable.read(found.run / "probe.json")
        if (table.step, table.which) == (found.step, "teacher"):
            return table
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or of another version
        pass
    return compare(found.folder)


def main() -> int:
    parser = argparse.ArgumentParser("finetune.report", description="Probe a run and draw what it learned.")
    parser.add_argument("path", help="a run folder, or one of its checkpoints/step_*")
    try:
        report(parser.parse_args().path)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
