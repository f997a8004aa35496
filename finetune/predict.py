"""Predictions of a fine-tuned text model for texts without labels: for GLUE's tests, the files that are submitted.

python -m finetune.predict RUN --out FOLDER [--split test] [--data PATH]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from finetune.config import NUMBER, Config
from finetune.glue import TASKS
from finetune.text import Meaning, TextTask, find_tokenizer, most_tokens, open_texts, padded
from pretrain import full
from pretrain.checkpoint import CheckpointError
from pretrain.data.sources import DataError
from pretrain.data.text import SentenceDataset
from pretrain.files import write_atomically
from pretrain.labelled.samples import like_sized
from pretrain.progress import Progress
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
    text = replace(config.text, tokenizer="")  # which has come with the weights
    config = replace(config, text=text, data=replace(config.data, path=data or config.data.path))
    if text.kind != NUMBER and full.LABELS not in found.assets:
        raise CheckpointError(f"{run} has no {full.LABELS} that names its outputs")
    classes = [] if text.kind == NUMBER else json.loads(found.assets[full.LABELS])
    low, high = text.range or (0.0, 1.0)
    meaning = Meaning(classes, low, high, bounded=bool(text.task))
    tokenizer = find_tokenizer(config, found.assets)
    network = found.network()
    network.load_state_dict(found.tensors)
    names = TASKS[text.task].tests if text.task else {}
    chosen = list(names) if not splits or list(splits) == ["test"] else list(splits)
    files = []
    for split in chosen or ["test"]:
        texts = open_texts(config, split, labelled=False)
        label = f"encoding {split}"
        dataset = SentenceDataset(texts.first, tokenizer, most_tokens(config), texts.second, label)
        told = told_of(network, dataset, config, meaning, f"predicting {split}")
        file = Path(out).expanduser() / f"{names.get(split, f'{split}_predictions')}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{index}\t{prediction}\n" for index, prediction in enumerate(told))
        write_atomically(file, f"index\tprediction\n{lines}")
        files.append(file)
    return files


@torch.inference_mode()
def told_of(network: nn.Module, dataset: SentenceDataset, config: Config, meaning: Meaning, label: str) -> list[str]:
    """What the network, in fp32, predicts of every text, in their order."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).eval()
    told = [""] * len(dataset)
    with Progress(label, len(dataset)) as progress:
        for batch in like_sized(dataset.lengths, config.eval.batch_size, TextTask.largest):
            inputs = padded([dataset[0, int(i)] for i in batch], config.model)
            lengths = None if inputs.lengths is None else inputs.lengths.to(device)
            outputs = network(inputs.inputs.to(device), lengths)
            for index, prediction in zip(batch, meaning.told(outputs), strict=True):
                told[index] = prediction
            progress.advance(len(batch))
    return told


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
