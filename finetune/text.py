"""Sentences, or pairs of them: classes, or a number. GLUE's tasks are of this kind (docs/method.md 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finetune import glue
from finetune.config import CLASSES, NUMBER, Config
from finetune.glue import read_split
from finetune.task import Examples, Some, Split, Task
from pretrain.data.fetch import resolve
from pretrain.data.names import digest
from pretrain.data.sources import DataError, Sample
from pretrain.data.tables import Texts, existing_table, numbered, read_texts, refuse_empty
from pretrain.data.text import SentenceDataset
from pretrain.data.tokenizer import Tokenizer, fitting, is_tokenizer, open_tokenizer, tokenizer_among
from pretrain.full import assets, assets_of
from pretrain.labelled.samples import pad
from pretrain.labelled.text import TEXT
from pretrain.settings import ConfigError


@dataclass(frozen=True)
class Meaning:
    """Of the network's outputs: a class each, or one number, which is `low` where the network says 0 and `high` where
    it says 1, and never told outside these if `bounded`."""

    classes: list[str]
    low: float = 0.0
    high: float = 1.0
    bounded: bool = False

    @property
    def labels(self) -> list[str]:
        return self.classes or [NUMBER]

    @property
    def range(self) -> tuple[float, float] | None:
        return None if self.classes else (self.low, self.high)

    def references(self, texts: Texts) -> NDArray:
        """(n,) int64 classes or fp32 numbers of labelled texts. Raises DataError, with the lines, for what is none."""
        assert texts.labels is not None
        if not self.classes:
            return ((numbers(texts) - self.low) / (self.high - self.low)).astype(np.float32)
        codes = {name: code for code, name in enumerate(self.classes)}
        if strange := [i for i, label in enumerate(texts.labels) if label not in codes]:
            lines = numbered([texts.lines[i] for i in strange])
            known = ", ".join(self.classes[:10]) + ("..." if len(self.classes) > 10 else "")
            raise DataError(f"{texts.file} {lines}: label {texts.labels[strange[0]]!r}, none of {known}")
        return np.array([codes[label] for label in texts.labels], np.int64)

    def told(self, outputs: Tensor) -> list[str]:
        """What outputs (B, C) say, as labels are written; numbers to six digits."""
        if self.classes:
            return [self.classes[i] for i in outputs.argmax(dim=-1).tolist()]
        shares = outputs[:, 0].clamp(0, 1) if self.bounded else outputs[:, 0]
        return [f"{self.low + (self.high - self.low) * share:.6g}" for share in shares.tolist()]


class LabelledTexts(SentenceDataset):
    """Texts of a split with their references, as the model takes them."""

    assets = ()

    def __init__(self, texts: Texts, references: NDArray, tokenizer: Tokenizer, tokens: int, progress: str) -> None:
        super().__init__(texts.first, tokenizer, tokens, texts.second, progress)
        self.references = references
        told = (
            f"{len(texts):,} {'texts' if texts.second is None else 'pairs of texts'} in {texts.file}",
            self.cut and f"{self.cut:,} of them are cut to {tokens} tokens",
            texts.left_out and f"{texts.left_out:,} lines with another number of fields are left out",
        )
        self.notes = tuple(note for note in told if note)

    def fingerprint(self) -> str:
        return digest(super().fingerprint().encode(), self.references)


class TextTask(Task):
    """The best checkpoint has the greatest mean of the task's figures: accuracy, or for numbers both correlations,
    where it is none of GLUE's."""

    largest = TEXT.largest

    def __init__(self, config: Config, progress: bool) -> None:
        super().__init__(config, progress)
        self.tokenizer = find_tokenizer(config, travelling(config))
        train = open_texts(config, config.data.split)
        self.meaning = meaning(config, train)
        self.labels = self.meaning.labels
        known = glue.TASKS.get(config.text.task)
        self.figures = known.figures if known else ("accuracy",) if self.meaning.classes else ("pearson", "spearman")
        texts, references = self._encoded(train, config.data.split, progress)
        groups = references if self.meaning.classes else np.zeros(len(references), np.int64)
        self.train = Split(Some.drawn(texts, groups, config), references)
        self.evaluated = {
            split: self._encoded(open_texts(config, split), split, progress) for split in config.eval.splits
        }

    def _encoded(self, texts: Texts, split: str, progress: bool) -> Split:
        references = self.meaning.references(texts)
        label = f"encoding {split}" if progress else ""
        return Split(LabelledTexts(texts, references, self.tokenizer, most_tokens(self.config), label), references)

    @property
    def resolved(self) -> Config:
        kind = CLASSES if self.meaning.classes else NUMBER
        return replace(super().resolved, text=replace(self.config.text, kind=kind, range=self.meaning.range))

    @property
    def assets(self) -> dict[str, bytes]:
        path = self.tokenizer.path
        return {path.name if is_tokenizer(path.name) else f"tokenizer{path.suffix}": self.tokenizer.content}

    def sizes(self, dataset: Any) -> NDArray[np.int64]:
        return dataset.lengths

    def collate(self, references: NDArray, samples: Sequence[Sample]) -> Examples:
        """-> (B, T) int64, the padding id behind the shorter ones, and (B,) int64 classes or fp32 numbers."""
        found = pad(samples, self.config.model, self.config.model.text.pad)
        targets = torch.from_numpy(references[[sample.index for sample in samples]])
        return Examples(found.inputs, targets, len(samples), found.lengths)

    def loss(self, outputs: Tensor, examples: Examples) -> Tensor:
        if self.meaning.classes:
            return F.cross_entropy(outputs.float(), examples.targets, reduction="sum")
        return F.mse_loss(outputs[:, 0].float(), examples.targets, reduction="sum")

    def predict(self, outputs: Tensor, examples: Examples) -> list[Any]:
        return (outputs.argmax(dim=-1) if self.meaning.classes else outputs[:, 0].float()).tolist()

    def judge(self, split: str, indices: list[int], predictions: list[Any]) -> dict[str, float]:
        return glue.judge(self.figures, np.array(predictions), self.evaluated[split].references[indices])

    def best(self, figures: dict[str, float]) -> float:
        return float(np.mean(list(figures.values())))


def open_texts(config: Config, split: str, labelled: bool = True) -> Texts:
    """The texts of a split. Raises DataError in one line."""
    if not config.data.path:
        raise DataError("data.path is not given: in which folder do the tables lie?")
    folder, text = Path(resolve(config.data.path)), config.text
    if text.task:
        own = folder / text.task
        return read_split(glue.TASKS[text.task], own if own.is_dir() else folder, split, labelled)
    found = read_texts(existing_table(folder, split), text.columns, labelled, quoted=text.quoted)
    refuse_empty(found, found.first, "text")
    if found.second is not None:
        refuse_empty(found, found.second, "second text")
    return found


def meaning(config: Config, train: Texts) -> Meaning:
    """What training's labels make of the outputs. Raises DataError if nothing can be learned from them."""
    text = config.text
    if text.task:
        return Meaning(list(glue.TASKS[text.task].classes), high=glue.HIGHEST, bounded=True)
    assert train.labels is not None
    if text.kind == NUMBER:
        found = numbers(train)
        low, high = text.range or (float(found.min()), float(found.max()))
        if low == high:
            raise DataError(f"all labels of {train.file} are {low:g}: there is nothing to learn")
        return Meaning([], low, high)
    classes = sorted(set(train.labels))
    if len(classes) < 2:
        raise DataError(f"all labels of {train.file} are {classes[0]!r}: there is nothing to learn")
    return Meaning(classes)


def numbers(texts: Texts) -> NDArray[np.float64]:
    """(n,) the labels as numbers. Raises DataError, with the lines, for what is none."""
    found, bad = np.zeros(len(texts)), []
    for i, label in enumerate(texts.labels or []):
        try:
            found[i] = float(label)
        except ValueError:
            found[i] = math.nan
        if not math.isfinite(found[i]):
            bad.append(i)
    if bad:
        lines = numbered([texts.lines[i] for i in bad])
        raise DataError(f"{texts.file} {lines}: label {(texts.labels or [])[bad[0]]!r} is no number")
    return found


def most_tokens(config: Config) -> int:
    return config.text.max_tokens or config.model.text.tokens


def travelling(config: Config) -> dict[str, bytes]:
    """The files that came with the weights: those of the run, if it has begun, else of `train.init_from`."""
    own = assets_of(Path(config.run.dir))
    return own if own or not config.train.init_from else assets(config.train.init_from)


def find_tokenizer(config: Config, files: dict[str, bytes]) -> Tokenizer:
    """The one among `files`, which came with the weights, else `text.tokenizer`, which must be the same where it is
    given, too. Raises ConfigError or DataError, in one line, if there is none, or it is not that of the model."""
    text = config.text
    own = tokenizer_among(files, config.model.text)
    given = fitting(open_tokenizer(text.tokenizer), config.model.text) if text.tokenizer else None
    if own and given and own.fingerprint != given.fingerprint:
        raise ConfigError(f"text.tokenizer={text.tokenizer} is not {own.path.name}, which the weights came with")
    if found := own or given:
        return found
    raise ConfigError(
        f"no tokenizer came with the weights (train.init_from={config.train.init_from!r}); give text.tokenizer"
    )
