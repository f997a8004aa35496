"""Probes of text: labelled sentences, the mean of their tokens, a bag of words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from models.config import ModelConfig
from models.masks import real_positions
from pretrain.config import Config
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.fetch import resolve
from pretrain.data.sources import DataError, Sample
from pretrain.data.text import SentenceDataset, Sentences, open_sentences
from pretrain.data.tokenizer import TOKENIZERS, Tokenizer, fitting, is_tokenizer, open_tokenizer, tokenizer_among
from pretrain.labelled.samples import Inputs, Labelled, Modality, NoProbe, Represent, last, pad, refuse_shared

PIECES, PIECE = 5000, 20  # of a corpus without labels: how many, of how many tokens


@dataclass(frozen=True)
class Sentence(Sample):
    """Ids, and the text that they were made of."""

    text: str = ""


class SentenceTexts(SentenceDataset):
    """Sentences by (epoch, index), with their texts; those too long are cut to what the model takes."""

    def __init__(self, sentences: Sentences, tokenizer: Tokenizer, max_tokens: int) -> None:
        super().__init__(sentences.texts, tokenizer, max_tokens)
        self.texts, self.tokenizer = sentences.texts, tokenizer

    def __getitem__(self, key: tuple[int, int]) -> Sentence:
        sample = super().__getitem__(key)
        return Sentence(sample.inputs, sample.epoch, sample.index, text=self.texts[sample.index])


def labelled(config: Config, path: str, run: Path | None = None) -> Labelled:
    try:
        train, test = open_sentences(path, "train"), open_sentences(path, "test")
    except DataError as error:
        raise NoProbe(
            f"no probe without labelled sentences: {error}; give a folder of them (--data, or probe.path of a run)"
        ) from None
    refuse_shared(test.texts, train.texts, path, TEXT.unit)
    tokenizer = find_tokenizer(config, run)
    most = config.model.text.tokens
    return Labelled(
        SentenceTexts(train, tokenizer, most),
        SentenceTexts(test, tokenizer, most),
        train.labels,
        test.labels,
        train.classes,
    )


def unlabelled(config: Config, run: Path | None = None) -> SentenceTexts:
    """Pieces of the run's corpus, evenly over it."""
    corpus = open_corpus(resolve(config.data.path), config.data.split)
    tokenizer = find_tokenizer(config, run)
    starts = np.arange(0, max(corpus.tokens - PIECE, 1), PIECE)
    starts = starts[np.linspace(0, len(starts) - 1, min(PIECES, len(starts))).astype(int)]
    texts = [" ".join(tokenizer.decode(corpus.read(int(i), int(i) + PIECE).tolist()).split()) for i in starts]
    sentences = Sentences(texts, np.zeros(len(texts), np.int64), [])
    return SentenceTexts(sentences, tokenizer, config.model.text.tokens)


def find_tokenizer(config: Config, run: Path | None) -> Tokenizer:
    """The copy in the run folder, else the corpus's own. Raises ConfigError if its ids are not those of the model."""
    copies = [path for path in run.glob("*") if is_tokenizer(path.name)] if run else []
    found = tokenizer_among({str(path): path.read_bytes() for path in copies}, config.model.text)
    return found or fitting(open_tokenizer(_corpus(config, run).tokenizer_path), config.model.text)


def _corpus(config: Config, run: Path | None) -> Corpus:
    where = f"no {' or '.join(TOKENIZERS)} in {run}, and" if run else "no run folder, and"
    if not config.data.path:
        raise DataError(f"no tokenizer: {where} data.path is not given")
    try:
        return open_corpus(resolve(config.data.path), config.data.split)
    except DataError as error:
        raise DataError(f"no tokenizer: {where} {error}") from None


def sizes(sentences: SentenceTexts) -> NDArray[np.int64]:
    return sentences.lengths


def collate(config: ModelConfig, samples: Sequence[Sample]) -> Inputs:
    """-> (B, T) int64, the padding id behind the shorter ones."""
    return pad(samples, config, config.text.pad)


def mean(states: Iterator[Tensor], lengths: Tensor | None, config: ModelConfig) -> Tensor:
    """-> (B, D), of the last block's output over all tokens of each sentence, <s> and </s> among them."""
    positions = last(states)
    real = real_positions(positions, lengths)
    return (positions * real).sum(dim=1) / real.sum(dim=1)


def plain(train: SentenceTexts, indices: Sequence[int]) -> Represent:
    """Words weighed by how rare they are in the training texts (TF-IDF), sparse, rows of length 1."""
    words = TfidfVectorizer(dtype=np.float32)
    try:
        words.fit([train.texts[i] for i in indices])
    except ValueError as error:
        raise NoProbe(f"no probe: no words of two letters or more in the training sentences ({error})") from None
    return lambda batch: words.transform([cast(Sentence, sample).text for sample in batch.samples])


def facts(config: Config) -> tuple[str, str]:
    return f"{config.model.positions} tokens", f"{config.train.batch_size} blocks"


TEXT = Modality(
    unit="sentences",
    position="tokens",
    baseline="bag of words",
    largest=16_384,
    labelled=labelled,
    unlabelled=unlabelled,
    sizes=sizes,
    collate=collate,
    seen=mean,
    plain=plain,
    facts=facts,
)
