"""Blocks of running text, and labelled sentences."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pretrain.data.corpus import build_corpus, open_corpus
from pretrain.data.sources import DataError
from pretrain.data.text import SentenceDataset, TextDataset, open_sentences
from pretrain.data.tokenizer import open_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
LINES = [f"The {n}th whale said that {n * n} men sail the white sea by night." for n in range(100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two corpora, of which blocks cross the border, and their tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "all.txt").write_text("\n".join(LINES))
    train_tokenizer([folder / "all.txt"], folder / "t.model", vocabulary=340)
    for name, lines in (("a", LINES[:40]), ("b", [*LINES[40:], ""])):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        build_corpus([folder / f"{name}.txt"], folder / "t.model", folder / "corpus" / name)
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    return open_corpus(folder / "corpus")


def stream(folder):
    encoded = open_tokenizer(folder / "t.model").encode_batch(LINES)
    return [i for ids in encoded for i in [*ids, 2]]


@pytest.mark.parametrize("tokens", [2, 7, 64, 500])
def test_blocks_are_the_running_text_with_bos_in_front(folder, corpus, tokens):
    dataset, expected = TextDataset(corpus, tokens=tokens), stream(folder)
    samples = [dataset[3, index] for index in range(len(dataset))]
    assert {(s.inputs.dtype, tuple(s.inputs.shape)) for s in samples} == {(torch.int64, (tokens,))}
    assert {int(s.inputs[0]) for s in samples} == {0}
    text = torch.cat([s.inputs[1:] for s in samples]).tolist()
    assert text == expected[: len(text)]
    assert 0 <= len(expected) - len(text) < tokens - 1
    assert [(s.epoch, s.index, s.failures) for s in samples] == [(3, i, ()) for i in range(len(dataset))]


def test_workers_forked_and_spawned_give_the_same(corpus):
    dataset = TextDataset(corpus, tokens=64)
    expected = [dataset[0, i].inputs.tolist() for i in range(8)]
    keys = [[(0, i) for i in range(k, k + 2)] for k in range(0, 8, 2)]
    for context in ("fork", "spawn"):
        loader = DataLoader(
            dataset, batch_sampler=keys, collate_fn=list, num_workers=2, multiprocessing_context=context
        )
        assert [s.inputs.tolist() for batch in loader for s in batch] == expected
    assert len(pickle.dumps(dataset)) < 2000


def test_what_the_user_is_told_and_what_a_run_keeps(folder, corpus):
    dataset, tokens = TextDataset(corpus, tokens=64), len(stream(folder))
    fingerprint = open_tokenizer(folder / "t.model").fingerprint[:12]
    assert dataset.notes == (
        f"{tokens:,} tokens in 100 documents, {tokens // 63} blocks of 64",
        f"tokenizer a.model: 340 ids, sha256 {fingerprint}",
        "left out when the corpus was made: 1 empty documents",
    )
    assert [path.read_bytes() for path in dataset.assets] == [(folder / "t.model").read_bytes()]


def test_indices_outside_and_blocks_that_cannot_be(folder, corpus):
    dataset, tokens = TextDataset(corpus, tokens=64), len(stream(folder))
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[0, index]
    assert len(TextDataset(corpus, tokens=tokens + 1)) == 1
    with pytest.raises(DataError, match=rf"^the corpus has {tokens:,} tokens, a block of {tokens + 2:,} needs more$"):
        TextDataset(corpus, tokens=tokens + 2)
    with pytest.raises(DataError, match="too few"):
        TextDataset(corpus, tokens=1)


def test_sentences(folder, tmp_path):
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(b"so so\tfine\r\ngood\tthe white whale\nbad\tno\tsea\n"))
    (tmp_path / "test.tsv").write_text("\ufeffso so\tmen\n")
    train, test = open_sentences(tmp_path), open_sentences(str(tmp_path), "test")
    assert train.classes == test.classes == ["bad", "good", "so so"]
    assert (train.labels.tolist(), train.labels.dtype) == ([2, 1, 0], np.int64)
    assert train.texts == ["fine", "the white whale", "no\tsea"]
    assert (test.labels.tolist(), test.texts) == ([2], ["men"])  # coded as in training
    tokenizer = open_tokenizer(folder / "t.model")
    dataset = SentenceDataset(train.texts, tokenizer, max_tokens=5)
    ids = tokenizer.encode_batch(train.texts)
    assert [dataset[1, i].inputs.tolist() for i in range(3)] == [[0, *i[:3], 2] for i in ids]
    assert (dataset[1, 2].epoch, dataset[1, 2].index, dataset[1, 2].inputs.dtype) == (1, 2, torch.int64)
    assert [len(dataset[0, i].inputs) for i in range(3)] == [min(5, len(i) + 2) for i in ids]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset[0, index]
    with pytest.raises(DataError, match="too few"):
        SentenceDataset(train.texts, tokenizer, max_tokens=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\tsea\nno label\ngood\tsea\ngood\t \n\n", r"test\.tsv lines 2, 4, 5: not 'label<TAB>text' in UTF-8$"),
        (b"good\tsea\ngood\t\xff\n", r"test\.tsv line 2: not"),
        (b"x\n" * 9, r"lines 1, 2, 3, 4, 5 and 4 more: not"),
        (b"good\tsea\nevil\tsea\n", r"test\.tsv line 2: labels that train\.tsv lacks, as 'evil'$"),
        (b"", r"test\.tsv is empty$"),
        (None, r"no test\.tsv or test\.tsv\.gz in .*; \.tsv files there: train\.tsv$"),
    ],
)
def test_bad_sentences_are_one_clear_line(tmp_path, content, message):
    (tmp_path / "train.tsv").write_text("good\tsea\n")
    if content is not None:
        (tmp_path / "test.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_sentences(tmp_path, "test")
    assert "\n" not in str(error.value)


def test_a_damaged_file_of_sentences(tmp_path):
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(b"good\tsea\n" * 100)[:-9])
    with pytest.raises(DataError, match=r"cannot read .*train\.tsv\.gz"):
        open_sentences(tmp_path)


def test_the_shipped_reviews_are_split_without_overlap():
    splits = {split: open_sentences(ROOT / "data/movie_reviews", split) for split in ("train", "test")}
    assert {split: np.bincount(s.labels).tolist() for split, s in splits.items()} == {
        "train": [4097, 3964],
        "test": [979, 1032],
    }
    assert splits["test"].classes == ["negative", "positive"]
    bare = [{"".join(filter(str.isalnum, t.lower())) for t in s.texts} for s in splits.values()]
    assert not bare[0] & bare[1]
