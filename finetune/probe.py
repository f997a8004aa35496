"""How well classes can be told from frozen features: k nearest neighbours and a linear probe, on few labels and on all.

python -m finetune.probe RUN_OR_CHECKPOINT [--labels 100 1000 all] [--which teacher|student]

One procedure for every representation. Both probes see features that are centred on the labelled images; the neighbours
are then those of greatest cosine, the linear probe's features are divided by their deviations. Everything that could be
tuned is tuned on labelled training images alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from torch import Tensor

from finetune.features import WEIGHTS, Array, FrozenEncoder, Represent, extract_each, find, load_encoder
from pretrain.checkpoint import CheckpointError, write_atomically
from pretrain.config import Config, ConfigError
from pretrain.data.fetch import resolve
from pretrain.data.image import ImageDataset
from pretrain.data.sources import DataError, ImageSource, open_images
from pretrain.progress import Progress

Labels = NDArray[np.int64]
Count = int | str  # of labels; ALL for as many as there are

ALL = "all"
COUNTS: tuple[Count, ...] = (100, 1000, ALL)
METHODS = ("knn", "linear")
PRETRAINED, UNTRAINED, PIXELS = "pre-trained", "untrained", "raw pixels"

DRAWS = 5  # of every subset smaller than all
NEIGHBOURS = 10
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the linear probe
FOLDS = 5
CROSS_VALIDATE = 200  # up to so many labels C is judged on every fold, above on the first
MOST_TRAIN, MOST_TEST = 60_000, 10_000  # images, evenly over classes; more would take hours and change little
PIXEL_EDGE = 32  # larger images are averaged down before their pixels count as features


class NoProbe(DataError):
    """The data cannot say how good features are: no labels, or nothing held out."""


@dataclass(frozen=True)
class Accuracy:
    """Share of test images told right: over the draws of the labels, of which `all` has one."""

    mean: float
    std: float
    draws: int


@dataclass
class ProbeTable:
    """Accuracies [representation][method][count of labels as text]; for whom and from what."""

    step: int
    which: str
    train_images: int
    test_images: int
    classes: list[str]
    rows: dict[str, dict[str, dict[str, Accuracy]]] = field(default_factory=dict)

    @property
    def counts(self) -> list[str]:
        return list(self.rows[PIXELS]["knn"])

    def __str__(self) -> str:
        counts = self.counts
        name, cell = max(map(len, self.rows)), 13
        bar = "-" * (name + 2 * (3 + cell * len(counts)))
        lines = [
            f"accuracy in % on {self.test_images:,} test images, features frozen ({self.which} at step {self.step:,}, "
            f"{self.train_images:,} training images)",
            " " * name + "".join(f"   {METHOD_NAMES[m]:^{cell * len(counts)}}" for m in METHODS),
            f"{'labels':<{name}}" + ("   " + "".join(f"{c:>{cell}}" for c in counts)) * len(METHODS),
            bar,
        ]
        for row, methods in self.rows.items():
            lines.append(
                f"{row:<{name}}"
                + "".join("   " + "".join(f"{percent(methods[m][c]):>{cell}}" for c in counts) for m in METHODS)
            )
        return "\n".join(line.rstrip() for line in lines)

    @property
    def verdict(self) -> str:
        """One sentence: the pre-trained features against the pixels' neighbours, which are a strong baseline where
        images are small and centred."""
        ours, pixels = self.rows[PRETRAINED], self.rows[PIXELS]["knn"]
        parts = []
        for count in self.counts:
            gain = {m: 100 * (ours[m][count].mean - pixels[count].mean) for m in METHODS}
            parts.append(f"{count} labels {gain['knn']:+.1f} by kNN and {gain['linear']:+.1f} by a linear probe")
        return f"Against kNN on raw pixels, {PRETRAINED} features give, in points: {'; '.join(parts)}."

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> ProbeTable:
        tree = json.loads(path.read_text())
        tree["rows"] = {
            row: {m: {c: Accuracy(**a) for c, a in counts.items()} for m, counts in methods.items()}
            for row, methods in tree["rows"].items()
        }
        return cls(**tree)


METHOD_NAMES = {"knn": "k nearest neighbours", "linear": "linear probe"}


def percent(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.mean:.1f}" + (f" ± {100 * accuracy.std:.1f}" if accuracy.draws > 1 else "")


def balanced_order(labels: Labels, seed: int) -> Labels:
    """An order whose every beginning is as class-balanced as the data allow, so that smaller subsets lie in larger."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    rank = np.empty(len(labels), np.int64)  # of each image among those of its class
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    return np.lexsort((rng.random(len(labels)), rank))


def knn_accuracy(train_x: Array, train_y: Labels, test_x: Array, test_y: Labels) -> float:
    """Neighbours by cosine on centred features, the nearer count for more; k = NEIGHBOURS, or fewer if a class has."""
    k = int(np.clip(np.bincount(train_y)[np.unique(train_y)].min(), 1, NEIGHBOURS))
    centre = train_x.mean(axis=0)
    neighbours = KNeighborsClassifier(
        k, weights="distance", algorithm="brute"
    )  # unit vectors: distance orders as cosine
    return float(neighbours.fit(normalize(train_x - centre), train_y).score(normalize(test_x - centre), test_y))


def linear_accuracy(train_x: Array, train_y: Labels, test_x: Array, test_y: Labels, seed: int = 0) -> float:
    """Multinomial logistic regression on standardised features; C is the best of STRENGTHS on held-out folds of the
    training labels, and all of them are then fitted with it."""
    mean, std = train_x.mean(axis=0), train_x.std(axis=0)
    std[std < 1e-6 * max(float(std.max()), 1e-12)] = np.inf  # a constant says nothing; on test images it may differ
    train, test = (train_x - mean) / std, (test_x - mean) / std
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        strength = _best_strength(train, train_y, seed)
        return float(_regression(strength).fit(train, train_y).score(test, test_y))


def _best_strength(x: Array, y: Labels, seed: int) -> float:
    folds = min(FOLDS, int(np.bincount(y)[np.unique(y)].min()))
    if folds < 2:
        return STRENGTHS[len(STRENGTHS) // 2]
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y))
    score = dict.fromkeys(STRENGTHS, 0.0)
    for fit, held in splits if len(y) <= CROSS_VALIDATE else splits[:1]:
        for strength in STRENGTHS:
            score[strength] += _regression(strength).fit(x[fit], y[fit]).score(x[held], y[held])
    return max(STRENGTHS, key=lambda s: (score[s], -s))


def _regression(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=100, tol=1e-3)


def usable(labels: Labels, counts: Sequence[Count]) -> list[Count]:
    """The counts that reach every class and that there are labels for."""
    classes = len(np.unique(labels))
    return [c for c in counts if c == ALL or classes <= int(c) < len(labels)]


def probe(
    train_x: Array, train_y: Labels, test_x: Array, test_y: Labels, labels: Sequence[Count] = COUNTS, progress: str = ""
) -> dict[str, dict[str, Accuracy]]:
    """Accuracies [method][count] of one representation. Subsets are nested, balanced, the same for every features."""
    counts = usable(train_y, labels)
    scores: dict[str, dict[str, list[float]]] = {m: {str(c): [] for c in counts} for m in METHODS}
    with Progress(progress, sum(1 if c == ALL else DRAWS for c in counts)) as told:
        for draw in range(DRAWS):
            order = balanced_order(train_y, seed=draw)
            for count in counts:
                if count == ALL and draw:
                    continue
                chosen = np.arange(len(train_y)) if count == ALL else order[: int(count)]
                data = train_x[chosen], train_y[chosen], test_x, test_y
                scores["knn"][str(count)].append(knn_accuracy(*data))
                scores["linear"][str(count)].append(linear_accuracy(*data, seed=draw))
                told.advance(1)
    return {m: {c: Accuracy(fmean(s), pstdev(s), len(s)) for c, s in by.items()} for m, by in scores.items()}


@dataclass(frozen=True)
class Labelled:
    """Training and test images of a run, centre-cropped, with labels that mean the same in both."""

    train: ImageDataset
    test: ImageDataset
    train_y: Labels
    test_y: Labels
    classes: list[str]


def labelled_data(config: Config) -> Labelled:
    """The `train` and `test` splits of the run's data. Raises NoProbe, in one line, if they cannot judge features."""
    path = resolve(config.data.path)
    train = open_images(path, "train")
    if train.labels is None:
        raise NoProbe(f"no probe: the images of {path} have no labels")
    try:
        test = open_images(path, "test")
    except DataError as error:
        raise NoProbe(f"no probe: no test images ({error})") from None
    if len(test) == len(train) and test.name(0) == train.name(0):
        raise NoProbe(f"no probe: {path} has no test split, its training images would be judged by themselves")
    if test.labels is None:
        raise NoProbe(f"no probe: the test images of {path} have no labels")
    strange = [test.classes[i] for i in np.unique(test.labels) if test.classes[i] not in train.classes]
    if strange:
        raise NoProbe(f"no probe: {path} has test images of classes without training images: {', '.join(strange[:5])}")
    number = np.array([train.classes.index(c) if c in train.classes else -1 for c in test.classes], np.int64)
    return Labelled(
        centre_crops(train, config), centre_crops(test, config), train.labels, number[test.labels], train.classes
    )


def centre_crops(source: ImageSource, config: Config) -> ImageDataset:
    image = config.model.image
    return ImageDataset(
        source,
        size=image.size,
        seed=config.train.seed,
        channels=image.channels,
        max_pixels=config.data.image.max_pixels,
        train=False,
    )


def raw_pixels(pixels: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> (B, C*h*w) in [0, 1], averaged down to at most PIXEL_EDGE a side."""
    scaled = pixels.float() / 255
    if scaled.shape[-1] > PIXEL_EDGE:
        scaled = F.adaptive_avg_pool2d(scaled, PIXEL_EDGE)
    return scaled.flatten(1)


def compare(path: str | Path, labels: Sequence[Count] = COUNTS, which: str = "teacher") -> ProbeTable:
    """Probes a run's encoder, the same encoder before training, and raw pixels; writes probe.json into the run folder.

    Raises NoProbe for data without labels or test split; ConfigError, CheckpointError or DataError as it finds them.
    """
    found = find(path)
    config = found.config
    data = labelled_data(config)
    if not usable(data.train_y, labels):
        raise ConfigError(f"--labels {' '.join(map(str, labels))}: give counts from {len(data.classes)} (one a class)")
    representations: dict[str, Represent] = {
        PRETRAINED: load_encoder(found.folder, which),
        UNTRAINED: FrozenEncoder.untrained(config.model, config.train.seed),
        PIXELS: raw_pixels,
    }

    def features(dataset: ImageDataset, y: Labels, most: int, label: str) -> tuple[list[Array], Labels]:
        chosen = np.sort(balanced_order(y, seed=0)[:most])
        functions = list(representations.values())
        return extract_each(functions, dataset, 256, label, chosen.tolist(), config.data.workers), y[chosen]

    train, train_y = features(data.train, data.train_y, MOST_TRAIN, "features of training images")
    test, test_y = features(data.test, data.test_y, MOST_TEST, "features of test images")
    table = ProbeTable(found.step, which, len(train_y), len(test_y), data.classes)
    for name, train_x, test_x in zip(representations, train, test, strict=True):
        table.rows[name] = probe(train_x, train_y, test_x, test_y, labels, f"probes on {name}")
    table.save(found.run / "probe.json")
    return table


def count_of_labels(text: str) -> Count:
    return ALL if text == ALL else int(text)


def main() -> int:
    parser = argparse.ArgumentParser("finetune.probe", description="kNN and linear probes on a run's frozen features.")
    parser.add_argument("path", help="a run folder, or one of its checkpoints/step_*")
    parser.add_argument("--labels", nargs="+", type=count_of_labels, default=list(COUNTS), metavar="N", help="or all")
    parser.add_argument("--which", choices=WEIGHTS, default="teacher")
    args = parser.parse_args()
    try:
        table = compare(args.path, args.labels, args.which)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{table}\n\n{table.verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
