"""Text for pre-training: blocks of running text; and labelled sentences, or pairs of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.data.corpus import Corpus
from pretrain.data.names import digest
from pretrain.data.sources import DataError, Sample
from pretrain.data.tables import existing_table, find_table, numbered, read_lines
from pretrain.data.tokenizer import Tokenizer
from pretrain.progress import Progress

ENCODED = 1000  # texts at a time


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
    file = existing_table(folder, split)
    rows = _rows(file)
    training = find_table(folder, "train") or file
    classes = sorted({label for label, _ in (rows if training == file else _rows(training))})
    codes = {label: code for code, label in enumerate(classes)}
    if strange := [number for number, (label, _) in enumerate(rows, start=1) if label not in codes]:
        lacked = f"labels that {training.name} lacks, as {rows[strange[0] - 1][0]!r}"
        raise DataError(f"{file} {numbered(strange)}: {lacked}")
    labels = np.array([codes[label] for label, _ in rows], np.int64)
    return Sentences([text for _, text in rows], labels, classes)


def _rows(file: Path) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    bad: list[int] = []
    for number, line in enumerate(read_lines(file), start=1):
        label, _, text = (part.strip() for part in (line or "").partition("\t"))
        rows.append((label, text))
        if not (label and text):
            bad.append(number)
    if bad:
        raise DataError(f"{file} {numbered(bad)}: not 'label<TAB>text' in UTF-8")
    return rows


class SentenceDataset(torch.utils.data.Dataset):
    """Texts as `<s> a </s>`, or with `others` pairs of them as `<s> a </s> </s> b </s>`, of `max_tokens` at most, asked
    for by (epoch, index). Of a pair that is too long, the longer text loses what is too much, until both are equally
    long. `progress` labels a progress line."""

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        max_tokens: int = 512,
        others: Sequence[str] | None = None,
        progress: str = "",
    ) -> None:
        least, specials = ("text and eos", 2) if others is None else ("two texts and three eos", 4)
        if max_tokens <= specials + (others is not None):
            raise DataError(f"a sample has bos, {least}: {max_tokens} tokens are too few")
        bos, eos, room = [tokenizer.bos], [tokenizer.eos], max_tokens - specials
        flat, ends = array("i"), array("q", [0])
        self.cut = 0
        """How many have lost something."""
        with Progress(progress, len(texts)) as told:
            for first in range(0, len(texts), ENCODED):
                rows = tokenizer.encode_batch(texts[first : first + ENCODED])
                pairs = tokenizer.encode_batch(others[first : first + ENCODED]) if others is not None else []
                for i, row in enumerate(rows):
                    other = pairs[i] if pairs else []
                    left, right = shares(len(row), len(other), room)
                    self.cut += left + right < len(row) + len(other)
                    flat.extend(bos + row[:left] + eos + (eos + other[:right] + eos if pairs else []))
                    ends.append(len(flat))
                told.advance(len(rows))
        self._ids, self._ends = np.frombuffer(flat, np.int32), np.frombuffer(ends, np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,), in tokens."""
        return np.diff(self._ends)

    def fingerprint(self) -> str:
        return digest(self._ids, self._ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, index), inputs (t,) with 2 <= t <= max_tokens."""
        epoch, index = key
        if not 0 <= index < len(self):
            raise IndexError(f"sentence {index} of {len(self)}")
        ids = self._ids[self._ends[index] : self._ends[index + 1]]
        return Sample(torch.from_numpy(ids.astype(np.int64)), epoch, index)


def shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts stay where there is room for so many; equally long ones share it evenly."""
    if first + second <= room:
        return first, second
    short = min(first, second, room // 2)
    return (short, room - short) if first <= second else (room - short, short)
