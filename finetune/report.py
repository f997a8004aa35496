"""Probes a run's newest checkpoint and draws what was learned, as one picture.

python -m finetune.report RUN [--data PATH]

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

from finetune import audio_panels, image_panels, text_panels
from finetune.features import FrozenEncoder, load_encoder
from finetune.panels import (
    BLUE,
    MUTED,
    PROBES,
    ROWS,
    STYLE,
    Shown,
    draw_deviations,
    draw_loss,
    draw_table,
    read_metrics,
    titled,
)
from finetune.probe import ProbeTable, compare, labelled_data
from models.baselines.config import DATA2VEC2
from pretrain.checkpoint import CheckpointError
from pretrain.data.sources import DataError
from pretrain.labelled.modality import MODALITIES
from pretrain.labelled.samples import NoProbe, balanced_order
from pretrain.saved import Checkpoint, find
from pretrain.settings import ConfigError

PANELS = {"image": image_panels, "audio": audio_panels, "text": text_panels}
TIMES = " \N{MULTIPLICATION SIGN} "
QUERIES = 2 * ROWS  # as many as any panel shows
GALLERY = 5000


def choose_samples(found: Checkpoint, data_path: str = "") -> tuple[Shown, str]:
    """Test samples as queries, one of each class in turn; training samples if there are no others. With it, the line
    that says why no probe is possible, or nothing."""
    config, modality = found.config, MODALITIES[found.config.model.modality]
    try:
        data = labelled_data(config, data_path, found.run)
    except NoProbe as reason:
        samples = modality.unlabelled(config, found.run)
        order = np.random.default_rng(0).permutation(len(samples)).tolist()
        shown = Shown(samples, samples, order[:QUERIES], order[: GALLERY + QUERIES], None, None, [])
        return shown, f"{reason}; the picture shows training {modality.unit}"
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
        draw_loss(figure.add_subplot(top[0]), metrics, config)
        probes = read_metrics(found.run / "eval.jsonl", PROBES)
        draw_deviations(figure.add_subplot(top[1]), metrics, config, probes)
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
        panels = PANELS[config.model.modality]
        for place, draw_panel in enumerate((panels.draw_task, panels.draw_alike, panels.draw_parts)):
            draw_panel(figure.add_subplot(bottom[place]), shown, config, encoder)
    return figure


def _heading(figure: Figure, found: Checkpoint, encoder: FrozenEncoder) -> None:
    config, meta = found.config, json.loads((found.folder / "state.json").read_text())
    model, train = config.model, config.train
    weights = sum(p.numel() for p in encoder.encoder.parameters())
    size = f"{weights / 1e9:.2f} G" if weights >= 1e9 else f"{weights / 1e6:.2f} M"
    sample, batch = MODALITIES[model.modality].facts(config)
    facts = [
        f"step {found.step:,} of {train.steps:,}",
        f"{model.prenet_depth + model.depth} blocks of width {model.width}, {size} weights",
        f"{sample}, {100 * model.mask.hidden(model.positions) / model.positions:.0f} % hidden",
        f"{batch}{TIMES}{model.num_masks} masks a step",
        f"{meta['ranks']} rank{'s' * (meta['ranks'] > 1)}, ZeRO {meta['zero_stage']}, {meta['precision']}",
    ]
    title = figure.text(0.02, 0.955, "data2vec 2.0", fontsize=21, fontweight="bold", va="baseline")
    end = title.get_window_extent().x1 / figure.bbox.width
    figure.text(end + 0.012, 0.955, found.run.name, fontsize=21, color=BLUE, va="baseline")
    figure.text(0.02, 0.928, "   ·   ".join(facts), fontsize=10.5, color=MUTED, va="center")


def report(path: str | Path, data_path: str = "") -> Path:
    """Probes (unless done for this step), draws report.png into the run folder, says where things are; its path.

    `data_path`: labelled data, if not the run's own.
    """
    found = find(path)
    if (objective := found.config.model.objective) != DATA2VEC2:
        raise ConfigError(f"{path} is of model.objective={objective}: the picture is data2vec's; see finetune.probe")
    shown, note = choose_samples(found, data_path)
    table = None if note else probed(found, data_path)
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


def probed(found: Checkpoint, data_path: str = "") -> ProbeTable:
    """The run's probe.json if it is of this step's teacher and these data, a new one otherwise."""
    try:
        table = ProbeTable.read(found.run / "probe.json")
        if (table.step, table.which, table.data) == (found.step, "teacher", data_path):
            return table
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or of another version
        pass
    return compare(found.folder, data_path=data_path)


def main() -> int:
    parser = argparse.ArgumentParser("finetune.report", description="Probe a run and draw what it learned.")
    parser.add_argument("path", help="a run folder, or one of its checkpoints/step_*")
    parser.add_argument("--data", default="", metavar="PATH", help="labelled train and test data; default: the run's")
    args = parser.parse_args()
    try:
        report(args.path, args.data)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
