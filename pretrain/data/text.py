"""Text for pre-training: blocks of running text; and labelled sentences for probes."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.data.corpus import Corpus
from pretrain.data.sources import DataError, Sample
from pretrain.data.tokenizer import Tokenizer


@dataclass(eq=False)
class TextDataset(torch.utils.data.Dataset):
    """Blocks of a corpus's running text, asked for by (epoch, index): bos, then `tokens` - 1 ids in a row.

    Blocks follow each other across the ends of documents; what remains behind the last whole one is left out.
    Every epoch has the same blocks. Raises `DataError` if there is less than one.
    """

    corpus: Corpus
    _: KW_ONLY
    tokens: int = 512
    notes: tuple[str, ...] = field(init=False)
    """What the user should know at the start, a line each."""
    assets: tuple[Path, ...] = field(init=False)
    """Files without which a model trained on this data is of no use."""

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise DataError(f"a block has bos and text: {self.tokens} token is too few")
        if not len(self):
            raise DataError(f"the corpus has {self.corpus.tokens:,} tokens, a block of {self.tokens:,} needs more")
        meta, path = self.corpus.meta, self.corpus.tokenizer_path
        blocks = f"{len(self):,} blocks of {self.tokens:,}"
        self.notes = (
            f"{self.corpus.tokens:,} tokens in {meta.documents:,} documents, {blocks}",
            f"tokenizer {path.name}: {meta.vocabulary:,} ids, sha256 {meta.fingerprint[:12]}",
        )
        if meta.skipped:
            skipped = ", ".join(f"{count:,} {reason}" for reason, count in meta.skipped.items())
            self.notes += (f"left out when the corpus was made: {skipped}",)
        self.assets = (path,)

    def fingerprint(self) -> str:
        return self.corpus.fingerprint()

    def __len__(self) -> int:
        return self.corpus.tokens // (self.tokens - 1)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, index); raises `IndexError` for an index outside the corpus."""
        epoch, index = key
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        text = self.tokens - 1
        inputs = np.empty(self.tokens, np.int64)
        inputs[0] = self.corpus.meta.bos
        inputs[1:] = self.corpus.read(index * text, (index + 1) * text)
        return Sample(torch.from_numpy(inputs), epoch, index)


@dataclass(frozen=True)
class Sentences:
    """Labelled sentences of one split."""

    texts: list[str]
    labels: NDArray[np.int64]
    """(n,), indices into `classes`."""
    classes: list[str]
    """Sorted labels, those of the training split if there is one."""

    def __len__(self) -> int:
        return len(self.texts)


def open_sentences(path: str | Path, split: str = "train") -> Sentences:
    """The sentences in `<split>.tsv` or `<split>.tsv.gz` of a folder, `label<TAB>text` a line, in UTF-8.

    Raises `DataError`, with the numbers of the lines, for what is not so, and for labels that training lacks.
    """
    folder = Path(path).expanduser()
    file = _sentence_file(folder, split)
    if file is None:
        there = ", ".join(sorted(entry.name for entry in folder.glob("*.tsv*"))) or "none"
        raise DataError(f"no {split}.tsv or {split}.tsv.gz in {folder}; .tsv files there: {there}")
    rows = _rows(file)
    training = _sentence_file(folder, "train") or file
    classes = sorted({label for label, _ in (rows if training == file else _rows(training))})
    codes = {label: code for code, label in enumerate(classes)}
    if strange := [number for number, (label, _) in enumerate(rows, start=1) if label not in codes]:
        raise DataError(f"{file} {_lines(strange)}: labels that {training.name} lacks, as {rows[strange[0] - 1][0]!r}")
    labels = np.array([codes[label] for label, _ in rows], np.int64)
    return Sentences([text for _, text in rows], labels, classes)


class SentenceDataset(torch.utils.data.Dataset):
    """Sentences as bos + ids + eos, of `max_tokens` at most, asked for by (epoch, index)."""

    def __init__(self, sentences: Sentences, tokenizer: Tokenizer, max_tokens: int = 512) -> None:
        if max_tokens < 3:
            raise DataError(f"a sentence has bos, text and eos: {max_tokens} tokens are too few")
        self.labels, self.classes = sentences.labels, sentences.classes
        ids = tokenizer.encode_batch(sentences.texts)
        self._inputs = [np.array([tokenizer.bos, *i[: max_tokens - 2], tokenizer.eos], np.int64) for i in ids]

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, index), inputs (t,) with 3 <= t <= max_tokens or t = 2 for a text without ids."""
        epoch, index = key
        if not 0 <= index < len(self):
            raise IndexError(f"sentence {index} of {len(self)}")
        return Sample(torch.from_numpy(self._inputs[index].copy()), epoch, index)


def _sentence_file(folder: Path, split: str) -> Path | None:
    files = (folder / f"{split}.tsv", folder / f"{split}.tsv.gz")
    return next((file for file in files if os.path.isfile(file)), None)


def _rows(file: Path) -> list[tuple[str, str]]:
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    rows: list[tuple[str, str]] = []
    bad: list[int] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            label, _, text = (part.strip() for part in line.decode().partition("\t"))
        except UnicodeDecodeError:
            label = text = ""
        rows.append((label, text))
        if not (label and text):
            bad.append(number)
    if bad:
        raise DataError(f"{file} {_lines(bad)}: not 'label<TAB>text' in UTF-8")
    if not rows:
        raise DataError(f"{file} is empty")
    return rows


def _lines(numbers: list[int]) -> str:
    more = f" and {len(numbers) - 5:,} more" if len(numbers) > 5 else ""
    return f"line{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:5]))}{more}"
