"""The eight tasks of GLUE's score: where their public files have what, how they are judged.

None of the files quotes: a double quote is text. CoLA's have no first line of names, but for its tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pretrain.data.sources import DataError
from pretrain.data.tables import Columns, Texts, existing_table, find_table, read_lines, read_texts

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class GlueTask:
    """`tests`: the splits without labels, and the names that their predictions are submitted under."""

    name: str
    columns: Columns
    tests: dict[str, str]
    classes: tuple[str, ...] = ()
    """None: a number from 0 to `HIGHEST` is to be predicted."""
    figures: tuple[str, ...] = ("accuracy",)
    test_columns: Columns | None = None
    """Where a test has its texts, if not where the others have them."""
    ragged: bool = False
    """Lines with another number of fields are known, and left out."""


HIGHEST = 5.0
_PAIR = Columns("sentence1", "sentence2", "label")
_ENTAILED = ("entailment", "not_entailment")
_BOTH = ("accuracy", "f1")
TASKS = {
    task.name: task
    for task in (
        GlueTask(
            "CoLA",
            Columns("4", "", "2"),
            {"test": "CoLA"},
            ("0", "1"),
            ("matthews",),
            test_columns=Columns("sentence"),
        ),
        GlueTask(
            "MNLI",
            Columns("sentence1", "sentence2", "gold_label"),
            {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"},
            ("contradiction", "entailment", "neutral"),
        ),
        GlueTask("MRPC", Columns("#1 String", "#2 String", "Quality"), {"test": "MRPC"}, ("0", "1"), _BOTH),
        GlueTask("QNLI", Columns("question", "sentence", "label"), {"test": "QNLI"}, _ENTAILED),
        GlueTask(
            "QQP",
            Columns("question1", "question2", "is_duplicate"),
            {"test": "QQP"},
            ("0", "1"),
            _BOTH,
            ragged=True,
        ),
        GlueTask("RTE", _PAIR, {"test": "RTE"}, _ENTAILED),
        GlueTask("SST-2", Columns("sentence", "", "label"), {"test": "SST-2"}, ("0", "1")),
        GlueTask(
            "STS-B",
            Columns("sentence1", "sentence2", "score"),
            {"test": "STS-B"},
            figures=("pearson", "spearman"),
        ),
    )
}


def read_split(task: GlueTask, folder: Path, split: str, labelled: bool = True) -> Texts:
    """The texts of a task's split as it is downloaded. Raises DataError in one line."""
    if task.name == "MRPC" and not find_table(folder, split):
        return _original(task, folder, split, labelled)
    if labelled and split in task.tests:
        raise DataError(f"{task.name}'s {split}.tsv has no labels; python -m finetune.predict predicts them")
    columns = task.test_columns if split in task.tests and task.test_columns else task.columns
    ragged = task.ragged and split not in task.tests
    return read_texts(existing_table(folder, split), columns, labelled, ragged=ragged)


def _original(task: GlueTask, folder: Path, split: str, labelled: bool) -> Texts:
    """Of MRPC's own files, the training one split by the pairs of ids in `dev_ids.tsv`, where that is there."""
    name = {"train": "train", "dev": "train", "test": "test"}.get(split)
    file, ids = folder / f"msr_paraphrase_{name}.txt", folder / "dev_ids.tsv"
    if name is None or not file.is_file() or (split == "dev" and not ids.is_file()):
        needed = f"msr_paraphrase_{name}.txt" + (" and dev_ids.tsv" if split == "dev" else "")
        raise DataError(f"{folder} has neither {split}.tsv nor " + (needed if name else "a split of that name"))
    found = read_texts(file, task.columns, labelled)
    if split == "test" or not ids.is_file():
        return found
    pairs = read_texts(file, Columns("#1 ID", "#2 ID"), labelled=False)
    held_out = {tuple((line or "").split()) for line in read_lines(ids)}
    assert pairs.second is not None and found.second is not None
    chosen = [
        i
        for i, pair in enumerate(zip(pairs.first, pairs.second, strict=True))
        if (pair in held_out) == (split == "dev")
    ]
    labels = [found.labels[i] for i in chosen] if found.labels else None
    first, second = [found.first[i] for i in chosen], [found.second[i] for i in chosen]
    return Texts(file, first, second, labels, [found.lines[i] for i in chosen])


def judge(names: Sequence[str], predictions: NDArray, references: NDArray) -> dict[str, float]:
    """The figures of those names, each at most 1; predictions that do not vary correlate with nothing: 0."""
    return {name: float(FIGURES[name](references, predictions)) for name in names}


def _varying(correlation: Callable) -> Callable[[Numbers, Numbers], float]:
    def found(references: Numbers, predictions: Numbers) -> float:
        constant = np.ptp(references) == 0 or np.ptp(predictions) == 0
        return 0.0 if constant else correlation(references, predictions).statistic

    return found


FIGURES: dict[str, Callable[[NDArray, NDArray], float]] = {
    "accuracy": accuracy_score,
    "f1": lambda references, predictions: f1_score(references, predictions, zero_division=0),  # of class 1
    "matthews": matthews_corrcoef,
    "pearson": _varying(pearsonr),
    "spearman": _varying(spearmanr),
}
