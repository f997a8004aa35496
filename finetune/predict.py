"""Predictions of a fine-tuned text model for texts without labels: for GLUE's tests, the files that are submitted.

python -m finetune.predict RUN --out FOLDER [--split test] [--data PATH]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from finetune.config import NUMBER, Config
from finetune.evaluate import predictions
from finetune.glue import TASKS
from finetune.task import Examples, Split, Task
from finetune.text import Meaning, TextTask, find_tokenizer, most_tokens, open_texts
from pretrain import full
from pretrain.checkpoint import CheckpointError
from pretrain.data.sources import DataError
from pretrain.data.text import SentenceDataset
from pretrain.files import write_atomically
from pretrain.full import Full
from pretrain.runtime import EXIT_BAD_INPUT
from pretrain.settings import ConfigError, build


def predict(run: str | Path, out: str | Path, splits: Sequence[str] = (), data: str = "") -> list[Path]:
    """Writes, for each split, `NAME.tsv` with lines `index<TAB>prediction`: GLUE's name, or `SPLIT_predictions`.

    `run`: a run folder, whose best checkpoint counts, one of its checkpoints, or a full form. `splits`: none given,
    GLUE's tests, or `test`; MNLI's `test` is both of its own. `data`: another folder than the run's. Returns the files.
    Raises ConfigError, CheckpointError or DataError, in one line.
    """
    found = full.read(run, best=True)
    if found.settings.get("task") != "text":
        raise ConfigError(f"{run} is no fine-tuned text model; python -m finetune makes one")
    config = build(Config, found.settings, source=str(run))
    names = TASKS[config.text.task].tests if config.text.task else {}
    chosen = list(names) if not splits or list(splits) == ["test"] else list(splits)
    config = replace(
        config,
        text=replace(config.text, tokenizer=""),  # which has come with the weights
        data=replace(config.data, path=data or config.data.path),
        eval=replace(config.eval, splits=tuple(chosen or ["test"])),
    )
    if config.text.kind != NUMBER and found.labels is None:
        raise CheckpointError(f"{run} has no {full.LABELS} that names its outputs")
    files = []
    for split, told in predictions(found, Unlabelled(config, found)).items():
        file = Path(out).expanduser() / f"{names.get(split, f'{split}_predictions')}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{index}\t{prediction}\n" for index, prediction in enumerate(told))
        write_atomically(file, f"index\tprediction\n{lines}")
        files.append(file)
    return files


class Unlabelled(TextTask):
    """Texts without labels, for a network that has learned what they are."""

    def __init__(self, config: Config, weights: Full) -> None:
        Task.__init__(self, config, progress=True)  # nothing is opened to learn from
        text = config.text
        low, high = text.range or (0.0, 1.0)
        classes = [] if text.kind == NUMBER else weights.labels or []
        self.meaning = Meaning(classes, low, high, bounded=bool(text.task))
        tokenizer = find_tokenizer(config, weights.assets)
        self.evaluated = {}
        for split in config.eval.splits:
            texts, label = open_texts(config, split, labelled=False), f"encoding {split}"
            dataset = SentenceDataset(texts.first, tokenizer, most_tokens(config), texts.second, label)
            self.evaluated[split] = Split(dataset, np.zeros(len(dataset), np.int64))

    def predict(self, outputs: Tensor, examples: Examples) -> list[str]:
        return self.meaning.told(outputs)


def main() -> int:
    parser = argparse.ArgumentParser("finetune.predict", description="Predict the labels of texts.")
    parser.add_argument("run", help="a run folder, one of its checkpoints/step_*, or a file of python -m convert")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--split", nargs="+", default=(), help="default: GLUE's tests, or test")
    parser.add_argument("--data", default="", metavar="PATH", help="default: the run's")
    args = parser.parse_args()
    try:
        for file in predict(args.run, args.out, args.split, args.data):
            print(file)
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
