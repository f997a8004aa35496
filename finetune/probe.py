"""How well classes can be told from frozen features: k nearest neighbours and a linear probe, on few labels and on all.

python -m finetune.probe RUN_OR_CHECKPOINT [--labels 100 1000 all] [--which teacher|student] [--data PATH]
python -m finetune.probe --features TRAIN TEST [--labels 100 1000 all]     # as python -m finetune.features writes them

One procedure for every representation. Both probes see features that are centred on the labelled samples; the
neighbours are then those of greatest cosine, the linear probe's features are divided by their deviations. Sparse
features, which centring would fill, are taken as they are. Everything that could be tuned is tuned on labelled training
samples alone.
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
from scipy.sparse import issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from finetune.features import FrozenEncoder, extract_each, load_encoder
from finetune.stored import load
from pretrain.checkpoint import CheckpointError
from pretrain.config import Config
from pretrain.data.fetch import resolve
from pretrain.data.sources import DataError
from pretrain.files import write_atomically
from pretrain.full import SUFFIX, WHICH
from pretrain.labelled.modality import MODALITIES
from pretrain.labelled.samples import (
    Labelled,
    Labels,
    Matrix,
    NoProbe,
    Represent,
    Samples,
    balanced_order,
    refuse_shared,
    renumbered,
    spread,
)
from pretrain.progress import Progress
from pretrain.saved import find
from pretrain.settings import ConfigError

Count = int | str  # of labels; ALL for as many as there are

ALL = "all"
COUNTS: tuple[Count, ...] = (100, 1000, ALL)
METHODS = ("knn", "linear")
PRETRAINED, UNTRAINED = "pre-trained", "untrained"

DRAWS = 5  # of every subset smaller than all
NEIGHBOURS = 10
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the linear probe
SPARSE_STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # on rows of length 1
FOLDS = 5
CROSS_VALIDATE = 200  # up to so many labels C is judged on every fold, above on the first
MOST_TRAIN, MOST_TEST = 60_000, 10_000  # samples, evenly over classes; more would take hours and change little


@dataclass(frozen=True)
class Accuracy:
    """Share of test samples told right: over the draws of the labels, of which `all` has one."""

    mean: float
    std: float
    draws: int


@dataclass
class ProbeTable:
    """Accuracies [representation][method][count of labels as text]; for whom and from what. `train_images` and
    `test_images` count samples, which are called `unit`; `data`: where they lie, if not where the run's data are."""

    step: int
    which: str
    train_images: int
    test_images: int
    classes: list[str]
    rows: dict[str, dict[str, dict[str, Accuracy]]] = field(default_factory=dict)
    unit: str = "images"
    data: str = ""

    @property
    def counts(self) -> list[str]:
        return list(next(iter(self.rows.values()))["knn"])

    @property
    def baseline(self) -> str:
        """The row of features that need no model."""
        return next(row for row in self.rows if row not in (PRETRAINED, UNTRAINED))

    def __str__(self) -> str:
        counts = self.counts
        name, cell = max(map(len, self.rows)), 13
        bar = "-" * (name + 2 * (3 + cell * len(counts)))
        lines = [
            f"accuracy in % on {self.test_images:,} test {self.unit}, features frozen ({self.which} at step "
            f"{self.step:,}, {self.train_images:,} training {self.unit})",
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
        """One sentence: the pre-trained features against the baseline, each probe against its like."""
        ours, plain = self.rows[PRETRAINED], self.rows[self.baseline]
        parts = []
        for count in self.counts:
            gain = {m: 100 * (ours[m][count].mean - plain[m][count].mean) for m in METHODS}
            parts.append(f"{count} labels {gain['knn']:+.1f} by kNN and {gain['linear']:+.1f} by a linear probe")
        return (
            f"Against {self.baseline} under the same probe, {PRETRAINED} features give, in points: {'; '.join(parts)}."
        )

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


def knn_accuracy(train_x: Matrix, train_y: Labels, test_x: Matrix, test_y: Labels) -> float:
    """Neighbours by cosine on centred features, the nearer count for more; k = NEIGHBOURS, or fewer if a class has."""
    k = int(np.clip(np.bincount(train_y)[np.unique(train_y)].min(), 1, NEIGHBOURS))
    centre = 0 if issparse(train_x) else train_x.mean(axis=0)
    train, test = (normalize(x - centre if not issparse(x) else x) for x in (train_x, test_x))
    neighbours = KNeighborsClassifier(
        k, weights="distance", algorithm="brute"
    )  # unit vectors: distance orders as cosine
    return float(neighbours.fit(train, train_y).score(test, test_y))


def linear_accuracy(train_x: Matrix, train_y: Labels, test_x: Matrix, test_y: Labels, seed: int = 0) -> float:
    """Multinomial logistic regression on standardised features; C is the best of STRENGTHS on held-out folds of the
    training labels, and all of them are then fitted with it."""
    train, test = train_x, test_x
    if not issparse(train_x):
        mean, std = train_x.mean(axis=0), train_x.std(axis=0)
        std[std < 1e-6 * max(float(std.max()), 1e-12)] = np.inf  # a constant says nothing; on test it may differ
        train, test = (train_x - mean) / std, (test_x - mean) / std
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        strength = _best_strength(train, train_y, seed)
        return float(_regression(strength).fit(train, train_y).score(test, test_y))


def _best_strength(x: Matrix, y: Labels, seed: int) -> float:
    folds = min(FOLDS, int(np.bincount(y)[np.unique(y)].min()))
    strengths = SPARSE_STRENGTHS if issparse(x) else STRENGTHS
    if folds < 2:
        return strengths[len(strengths) // 2]
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(y)), y))
    score = dict.fromkeys(strengths, 0.0)
    for fit, held in splits if len(y) <= CROSS_VALIDATE else splits[:1]:
        for strength in strengths:
            score[strength] += _regression(strength).fit(x[fit], y[fit]).score(x[held], y[held])
    return max(strengths, key=lambda s: (score[s], -s))


def _regression(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=100, tol=1e-3)


def usable(labels: Labels, counts: Sequence[Count]) -> list[Count]:
    """The counts that reach every class and that there are labels for."""
    classes = len(np.unique(labels))
    return [c for c in counts if c == ALL or classes <= int(c) < len(labels)]


def probe(
    train_x: Matrix,
    train_y: Labels,
    test_x: Matrix,
    test_y: Labels,
    labels: Sequence[Count] = COUNTS,
    progress: str = "",
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


def labelled_data(config: Config, path: str = "", run: Path | None = None) -> Labelled:
    """The `train` and `test` splits at `path`, or else of the run's data; `run` is its folder, if there is one.

    Raises NoProbe, in one line, if they cannot judge features.
    """
    return MODALITIES[config.model.modality].labelled(config, resolve(path or config.data.path), run)


def compare(
    path: str | Path, labels: Sequence[Count] = COUNTS, which: str = "teacher", data_path: str = ""
) -> ProbeTable:
    """Probes a run's encoder, the same encoder before training, and a baseline, on the run's data or those at
    `data_path`; writes probe.json into the run folder.

    Raises NoProbe for data without labels or test split; ConfigError, CheckpointError or DataError as it finds them.
    """
    if Path(path).suffix == SUFFIX:
        raise ConfigError(
            f"{path} is no run, whose data these probes are on; python -m finetune.features {path} DATA --what probe "
            "--out FOLDER, once for training and once for test, then python -m finetune.probe --features TRAIN TEST"
        )
    found = find(path)
    config, modality = found.config, MODALITIES[found.config.model.modality]
    data = labelled_data(config, data_path, found.run)
    if not usable(data.train_y, labels):
        raise ConfigError(f"--labels {' '.join(map(str, labels))}: give counts from {len(data.classes)} (one a class)")
    train_ids, test_ids = spread(data.train_y, MOST_TRAIN), spread(data.test_y, MOST_TEST)
    representations: dict[str, Represent] = {
        PRETRAINED: load_encoder(found.folder, which).represent,
        UNTRAINED: FrozenEncoder.untrained(config.model, config.train.seed).represent,
        modality.baseline: modality.plain(data.train, train_ids.tolist()),
    }

    def features(dataset: Samples, chosen: Labels, split: str) -> tuple[list[Matrix], Labels]:
        """Of the samples that can be read, and which these are."""
        functions, label = list(representations.values()), f"features of {split} {modality.unit}"
        found, genuine = extract_each(
            functions, dataset, config.model, 256, label, chosen.tolist(), config.data.workers
        )
        if lost := int((~genuine).sum()):
            print(f"left out {lost:,} {split} {modality.unit} that cannot be read")
        return [matrix[genuine] for matrix in found], chosen[genuine]

    train, train_ids = features(data.train, train_ids, "training")
    test, test_ids = features(data.test, test_ids, "test")
    table = ProbeTable(found.step, which, len(train_ids), len(test_ids), data.classes)
    table.unit, table.data = modality.unit, data_path
    for name, train_x, test_x in zip(representations, train, test, strict=True):
        task = train_x, data.train_y[train_ids], test_x, data.test_y[test_ids]
        table.rows[name] = probe(*task, labels, f"probes on {name}")
    table.save(found.run / "probe.json")
    return table


def compare_stored(train: str | Path, test: str | Path, labels: Sequence[Count] = COUNTS) -> ProbeTable:
    """Probes stored features, a row for each kind and block of them.

    Raises NoProbe, ConfigError or DataError, in one line, for features that are incomplete, not of one model, without
    labels, or of every position.
    """
    (index, x), (held, test_x) = load(train), load(test)
    for key in ("weights", "what", "blocks", "dtype"):
        if index.settings[key] != held.settings[key]:
            differ = f"{index.settings[key]} and {held.settings[key]}"
            raise ConfigError(f"{train} and {test} differ in {key}: {differ}; extract them alike")
    if index.settings["what"] == "positions":
        raise ConfigError(f"{train} holds every position; probes take --what pooled or --what probe")
    if index.labels is None or held.labels is None:
        raise NoProbe(f"no probe: the features in {train if index.labels is None else test} have no labels")
    unit = MODALITIES[index.about["modality"]].unit
    refuse_shared(held.names, index.names, str(test), unit)
    train_y, test_y = np.array(index.labels), renumbered(np.array(held.labels), held.classes, index.classes)
    if (test_y < 0).any() or not usable(train_y, labels):
        raise NoProbe(f"no probe: {test} has other classes than {train}, or --labels are fewer than those")
    train_ids, test_ids = spread(train_y, MOST_TRAIN), spread(test_y, MOST_TEST)
    table = ProbeTable(index.about["step"], index.about["which"], len(train_ids), len(test_ids), index.classes)
    table.unit, table.data = unit, str(train)
    for name in x:
        if x[name].ndim == 2:
            task = x[name][train_ids], train_y[train_ids], test_x[name][test_ids], test_y[test_ids]
            table.rows[name] = probe(*task, labels, f"probes on {name}")
    return table


def count_of_labels(text: str) -> Count:
    return ALL if text == ALL else int(text)


def main() -> int:
    parser = argparse.ArgumentParser("finetune.probe", description="kNN and linear probes on a run's frozen features.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("path", nargs="?", help="a run folder, or one of its checkpoints/step_*")
    what.add_argument("--features", nargs=2, metavar=("TRAIN", "TEST"), help="folders of python -m finetune.features")
    parser.add_argument("--labels", nargs="+", type=count_of_labels, default=list(COUNTS), metavar="N", help="or all")
    parser.add_argument("--which", choices=WHICH, default="teacher")
    parser.add_argument("--data", default="", metavar="PATH", help="labelled train and test data; default: the run's")
    args = parser.parse_args()
    try:
        if args.features:
            train, test = args.features
            print(f"\n{compare_stored(train, test, args.labels)}")
            return 0
        table = compare(args.path, args.labels, args.which, args.data)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{table}\n\n{table.verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
