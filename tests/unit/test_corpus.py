"""Corpora: Megatron's format both ways, the same for any number of workers, bad text and damage in one clear line."""

import bz2
import functools
import gzip
import json
import lzma
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import documents, encode
from pretrain.data.corpus import adopt_corpus, build_corpus, main, open_corpus
from pretrain.data.documents import TextReader, find_text
from pretrain.data.sources import DataError
from pretrain.data.tokenizer import SentencePieceTokenizer, open_tokenizer, train_tokenizer

WORDS = "the whale sea ship captain said harpoon ocean white men old night hand time boat water great head Ahab"
rng = random.Random(0)
LINES = [" ".join(rng.choices(WORDS.split(), k=rng.randint(1, 30))) + "." for _ in range(300)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "t.txt").write_text("\n".join(LINES))
    train_tokenizer([folder / "t.txt"], folder / "small.model", vocabulary=340)
    return folder / "small.model"


@pytest.fixture
def built(tmp_path, model):
    (tmp_path / "t.txt").write_text("\n".join(LINES) + "\n")
    build_corpus([tmp_path / "t.txt"], model, tmp_path / "c")
    return tmp_path / "c"


@functools.cache
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def texts(corpus):
    """The documents' texts, as they are between the eos of the stream."""
    tokenizer = open_tokenizer(corpus.tokenizer_path)
    ids = corpus.read(0, corpus.tokens)
    ends = np.flatnonzero(ids == tokenizer.eos)
    assert ends[-1] == corpus.tokens - 1
    return [tokenizer.decode(part.tolist()) for part in np.split(ids, ends + 1)[:-1]]


def read(path, **options):
    """The documents a reader finds: pieces joined."""
    reader = TextReader(find_text([path]), **options)
    found, parts = [], []
    for piece in reader:
        parts.append(piece.text)
        if piece.last:
            found.append("".join(parts))
            parts = []
    assert not parts and reader.consumed == reader.bytes
    return found, reader


def test_a_corpus_is_the_text_and_describes_itself(built, model):
    corpus = open_corpus(built)
    assert texts(corpus) == LINES
    expected = open_tokenizer(model).encode_batch(LINES)
    assert corpus.read(0, corpus.tokens).tolist() == [i for ids in expected for i in [*ids, 2]]
    meta = corpus.meta
    assert (meta.documents, meta.tokens, meta.vocabulary) == (len(LINES), corpus.tokens, 340)
    assert (meta.bos, meta.pad, meta.eos, meta.unk) == (0, 1, 2, 3)
    assert (meta.skipped, meta.sources, meta.tokenizer) == ({}, ["t.txt"], "c.model")
    assert corpus.tokenizer_path.read_bytes() == model.read_bytes()
    assert meta.largest_id == corpus.read(0, corpus.tokens).max()
    assert sorted(p.name for p in built.parent.iterdir()) == ["c.bin", "c.idx", "c.json", "c.model", "t.txt"]


def test_the_fingerprint_tells_texts_apart_wherever_they_lie(built, model, tmp_path):
    expected = open_corpus(built).fingerprint()
    (tmp_path / "there").mkdir()
    for file in built.parent.glob("c.*"):
        shutil.copy(file, tmp_path / "there")
    assert open_corpus(tmp_path / "there" / "c").fingerprint() == expected
    (tmp_path / "t.txt").write_text("\n".join([LINES[1], LINES[0], *LINES[2:]]) + "\n")
    build_corpus([tmp_path / "t.txt"], model, tmp_path / "d")
    assert open_corpus(tmp_path / "d").fingerprint() != expected


def test_megatron_reads_ours(built, model):
    theirs = megatron().IndexedDataset(str(built))
    expected = open_tokenizer(model).encode_batch(LINES)
    assert [ids.tolist() for ids in theirs] == [[*ids, 2] for ids in expected]
    assert theirs.document_indices.tolist() == list(range(len(LINES) + 1))
    assert theirs.index.dtype is np.uint16


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_megatron_wrote_is_adopted(tmp_path, model, dtype, capsys):
    prefix = str(tmp_path / "theirs")
    builder = megatron().IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    stream = np.random.default_rng(0).integers(4, 340, 1000)
    for document in np.split(stream, [10, 11, 500]):  # of two sequences each
        half = len(document) // 2
        builder.add_document(document, [half, len(document) - half])
    builder.finalize(f"{prefix}.idx")
    with pytest.raises(DataError, match=f"theirs.json.* is missing: make it with .*corpus adopt {prefix} --tokenizer"):
        open_corpus(prefix)
    main(["adopt", prefix, "--tokenizer", str(model)])
    out, err = capsys.readouterr()
    assert "1,000 tokens in 4 documents" in out and "of the first 4 documents only 0 end with </s>" in err
    corpus = open_corpus(f"{prefix}.idx")
    assert corpus.read(0, 1000).tolist() == stream.tolist()
    assert corpus.meta.documents == 4
    with pytest.raises(DataError, match="exists already"):
        adopt_corpus(prefix, model)


@pytest.mark.parametrize("bad", [340, -1])
def test_foreign_ids_outside_the_vocabulary_are_refused(tmp_path, model, bad):
    builder = megatron().IndexedDatasetBuilder(str(tmp_path / "c.bin"), np.int32)
    builder.add_document(np.array([5, bad, 2]), [3])
    builder.finalize(str(tmp_path / "c.idx"))
    with pytest.raises(DataError, match=f"the id {bad}, outside its tokenizer's vocabulary of 340"):
        adopt_corpus(tmp_path / "c", model)
    assert not (tmp_path / "c.json").exists()


def test_adopting_a_closed_corpus_changes_nothing_and_warns_of_nothing(built, model):
    before = (built.with_suffix(".json")).read_text()
    built.with_suffix(".json").unlink()
    assert adopt_corpus(f"{built}.bin", model) == ""
    after = json.loads(built.with_suffix(".json").read_text())
    assert after == json.loads(before) | {"sources": ["c"]}


def test_any_number_of_workers_gives_the_same_files(tmp_path, model, monkeypatch):
    monkeypatch.setattr(encode, "_BATCH", 500)  # many batches, documents across them
    monkeypatch.setattr(documents.TextReader.__init__, "__defaults__", ("line", 100))
    (tmp_path / "t.txt").write_text("\n".join([*LINES, "", LINES[0] + " " * 300, " ".join(LINES[:50])]))
    for workers in (1, 2, 3):
        build_corpus([tmp_path / "t.txt"], model, tmp_path / f"w{workers}" / "c", workers=workers)
    for file in ("c.bin", "c.idx", "c.json"):
        assert len({(tmp_path / f"w{workers}" / file).read_bytes() for workers in (1, 2, 3)}) == 1
    corpus = open_corpus(tmp_path / "w3")
    assert texts(corpus) == [*LINES, LINES[0], " ".join(LINES[:50])]
    assert corpus.meta.skipped == {"empty documents": 1}
    theirs = megatron().IndexedDataset(str(tmp_path / "w3" / "c"))
    assert len(theirs.document_indices) - 1 == corpus.meta.documents == len(LINES) + 2
    assert len(theirs) > len(LINES) + 50  # long documents have several sequences


def test_kinds_of_documents_and_files(tmp_path):
    content = "\ufeffone\r\ntwo\n\n \nthree\n  four  \n\n"
    (tmp_path / "t.txt").write_bytes(content.encode())
    assert read(tmp_path / "t.txt")[0] == ["one", "two", "", "", "three", "four", ""]
    assert read(tmp_path / "t.txt", documents="blank")[0] == [
        "one\ntwo",
        "three\n  four",
    ]
    assert len(read(tmp_path / "t.txt", documents="file")[0]) == 1
    for ending, pack in ((".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)):
        (tmp_path / "packed").mkdir(exist_ok=True)
        (tmp_path / f"packed/t.txt{ending}").write_bytes(pack(content.encode()))
    (tmp_path / "packed/.hidden.txt").write_text("no")
    (tmp_path / "packed/notes.md").write_text("no")
    assert read(tmp_path / "packed")[0] == read(tmp_path / "t.txt")[0] * 3
    records = [{"text": "a\n\nb"}, {"text": ""}, {"text": 5}, ["x"], {"title": "x"}, {"text": "\ud800"}, {"text": "z"}]
    lines = [json.dumps(record).encode() for record in records] + [b"{broken", b"", b'{"text": "\xff"}', b"null"]
    (tmp_path / "r.jsonl").write_bytes(b"\n".join(lines))
    found, reader = read(tmp_path / "r.jsonl", documents="line")
    assert found == ["a\n\nb", "", "z"]
    assert reader.skipped == {documents.NOT_JSON: 5, documents.NOT_UTF8: 2}
    assert reader.first[documents.NOT_JSON] == f"{tmp_path}/r.jsonl line 3"


@pytest.mark.parametrize("kind", ["line", "blank", "file"])
@pytest.mark.parametrize("unit", ["word another ", "x", "鯨", "é🐋", " ", "\t ", "a" * 63 + " "])
@pytest.mark.parametrize("ending", ["", "\n", "\nnext\n"])
def test_long_lines_come_in_bounded_pieces_and_lose_nothing(tmp_path, kind, unit, ending):
    text = "start " + unit * (5000 // len(unit)) + ending
    (tmp_path / "t.txt").write_text(text)
    pieces = list(TextReader([tmp_path / "t.txt"], kind, piece=64))
    assert max(len(piece.text.encode()) for piece in pieces) <= 64
    whole = "".join(piece.text + "\n" * piece.last for piece in pieces)
    assert whole.split() == text.split()
    assert sum(piece.last for piece in pieces) == (2 if kind == "line" and "next" in ending else 1)
    if unit.startswith("word"):
        assert all(piece.text[-1] != " " and piece.text[0] in " s\nn" for piece in pieces)  # cut before a space
    assert not TextReader([tmp_path / "t.txt"], kind, piece=64).skipped


@pytest.mark.parametrize("unit", ["word another ", "é", "x"])
def test_a_byte_order_mark_does_not_hinder_long_lines(tmp_path, unit):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + (unit * 400).encode())
    reader = TextReader([tmp_path / "t.txt"], piece=64)
    pieces = list(reader)
    assert "".join(piece.text for piece in pieces).replace(" ", "") == (unit * 400).replace(" ", "")
    assert max(len(piece.text.encode()) for piece in pieces) <= 64 and not reader.skipped
    if " " in unit:
        assert all(piece.text.strip().split()[0] in ("word", "another") for piece in pieces)


def test_of_a_long_line_that_is_not_utf8_the_rest_is_left_out_and_it_counts_once(tmp_path):
    spoilt = b"a" * 100 + b"\xff" + b"b" * 100 + b"\xff" + b"c" * 300
    (tmp_path / "t.txt").write_bytes(b"before\n" + spoilt + b"\nafter\n")
    reader = TextReader([tmp_path / "t.txt"], piece=64)
    text = "".join(piece.text for piece in reader)
    assert reader.skipped == {documents.NOT_UTF8: 1}
    assert text.startswith("beforea") and text.endswith("after") and "b" not in text[6:] and "c" not in text


def test_lines_that_are_not_utf8_are_left_out_and_named(tmp_path, model):
    (tmp_path / "t.txt").write_bytes(b"the sea\nbad \xff\xfe\nthe\0 ship\n\xed\xa0\x80\nthe whale\n\n")
    reader = build_corpus([tmp_path / "t.txt"], model, tmp_path / "c")
    corpus = open_corpus(tmp_path / "c")
    assert texts(corpus) == ["the sea", "the ship", "the whale"]
    assert corpus.meta.skipped == {documents.NOT_UTF8: 2, documents.NUL: 1, documents.EMPTY: 1}
    assert reader.first[documents.NOT_UTF8] == f"{tmp_path}/t.txt line 2"
    assert reader.first[documents.EMPTY] == f"{tmp_path}/t.txt line 6"


def test_a_line_of_many_megabytes(tmp_path, model):
    with (tmp_path / "t.txt").open("w") as file:
        for unit in ("the whale ", "whale"):
            for _ in range(40):
                file.write(unit * (100_000 // len(unit)))
            file.write("\n")
    script = """
import resource, sys
from pretrain.data.corpus import build_corpus, warnings
from megatron.core.datasets import indexed_dataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
build_corpus([sys.argv[1]], sys.argv[2], sys.argv[3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    arguments = [tmp_path / "t.txt", model, tmp_path / "c"]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100, "MiB more than before, for 8 MB of text of which a piece is 1 MB"
    assert open_corpus(tmp_path / "c").meta.documents == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no documents in 1 file.*1 empty documents"),
        (b"\n \n\n", "no documents in 1 file.*3 empty documents"),
        ("the sea".encode("utf-16"), "no documents in 1 file.*1 lines that are not UTF-8"),
        (None, "does not exist"),
        (b"PAR1....", "is Parquet, not text"),
        (b"\x28\xb5\x2f\xfd....", "is Zstandard, not text"),
        (gzip.compress(b"the sea", mtime=0), "is gzip without .gz in its name"),
    ],
)
def test_what_no_corpus_comes_from(tmp_path, model, content, message):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    kind = "file" if content == b"" else "line"
    with pytest.raises(SystemExit, match=message) as stopped:
        arguments = [str(tmp_path / "t.txt"), "--tokenizer", str(model), "--out", str(tmp_path / "c")]
        main([*arguments, "--workers", "1", "--documents", kind])
    assert "\n" not in str(stopped.value)
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"] * (content is not None)


def test_damaged_and_empty_sources(tmp_path, model):
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress("\n".join(LINES).encode())[:-40])
    (tmp_path / "u.txt.xz").write_bytes(b"no xz at all")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("t.txt.gz", "cannot read .*t.txt.gz: "),
        ("u.txt.xz", "cannot read"),
        ("folder", "no text in"),
    ):
        with pytest.raises(DataError, match=message):
            build_corpus([tmp_path / name], model, tmp_path / "c", workers=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "t.txt.gz", "u.txt.xz"]


def test_an_existing_corpus_is_not_overwritten(built, model):
    before = {p: p.read_bytes() for p in built.parent.iterdir()}
    with pytest.raises(DataError, match=r"c\.bin exists already"):
        build_corpus([built.parent / "t.txt"], model, built)
    assert {p: p.read_bytes() for p in built.parent.iterdir()} == before


def test_another_tokenizer_is_not_overwritten(built, model, tmp_path):
    folder = tmp_path / "other"
    other = folder / "c.model"
    train_tokenizer([built.parent / "t.txt"], other, vocabulary=310)
    before = other.read_bytes()
    with pytest.raises(DataError, match=r"c\.model exists already and is another tokenizer"):
        build_corpus([built.parent / "t.txt"], model, folder / "c")
    for ending in ("bin", "idx"):
        shutil.copy(f"{built}.{ending}", folder / f"c.{ending}")
    with pytest.raises(DataError, match=r"c\.model exists already and is another tokenizer"):
        adopt_corpus(folder / "c", model)
    assert other.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["c.bin", "c.idx", "c.model"]


def swap(path, start, content):
    data = bytearray(path.read_bytes())
    data[start : start + len(content)] = content
    path.write_bytes(data)


def change_meta(prefix, **values):
    file = prefix.with_suffix(".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGE = {
    "short bin": (lambda c: os.truncate(f"{c}.bin", 100), r"c\.bin is truncated or damaged: 100 bytes, .*c\.idx says"),
    "no bin": (lambda c: os.remove(f"{c}.bin"), r"cannot read .*c\.bin: No such file"),
    "no idx": (lambda c: os.remove(f"{c}.idx"), r"c\.idx does not exist: make one with"),
    "empty idx": (lambda c: os.truncate(f"{c}.idx", 0), r"cannot read .*c\.idx"),
    "header only": (lambda c: os.truncate(f"{c}.idx", 20), r"c\.idx is truncated|no index of token ids"),
    "short idx": (lambda c: os.truncate(f"{c}.idx", 1000), r"c\.idx is truncated or damaged: 1,000 bytes do not fit"),
    "magic": (lambda c: swap(Path(f"{c}.idx"), 0, b"XX"), r"c\.idx is no index of token ids"),
    "floats": (lambda c: swap(Path(f"{c}.idx"), 17, b"\x06"), r"c\.idx is no index of token ids"),
    "counts": (lambda c: swap(Path(f"{c}.idx"), 18, b"\xff" * 8), r"c\.idx is truncated or damaged"),
    "no json": (lambda c: os.remove(f"{c}.json"), r"c\.json, .* is missing: make it with"),
    "bad json": (lambda c: os.truncate(f"{c}.json", 10), r"c\.json is damaged"),
    "fewer fields": (lambda c: Path(f"{c}.json").write_text("{}"), r"c\.json is damaged: KeyError 'tokenizer'"),
    "tokens": (lambda c: change_meta(c, tokens=5), r"c\.json says 5: they do not belong together"),
    "no tokenizer": (lambda c: os.remove(f"{c}.model"), r"cannot read .*c\.model, the tokenizer of"),
    "tokenizer": (lambda c: swap(Path(f"{c}.model"), 100, b"XX"), r"c\.model is not the tokenizer that"),
    "ids": (lambda c: swap(Path(f"{c}.bin"), 10, b"\xff\xff"), r"c has the id 65,535, outside .* vocabulary of 340"),
    "vocabulary": (lambda c: change_meta(c, largest_id=340), r"the id 340, outside"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line(built, name):
    harm, message = DAMAGE[name]
    harm(built)
    with pytest.raises(DataError, match=message) as error:
        open_corpus(built)
    assert "\n" not in str(error.value)


def test_several_corpora_are_one_stream(tmp_path, model):
    for name, part in (("b", LINES[100:]), ("a", LINES[:100])):
        (tmp_path / f"{name}.txt").write_text("\n".join([*part, ""][: len(part) + (name == "b")]))
        build_corpus([tmp_path / f"{name}.txt"], model, tmp_path / "in" / name)
    corpus = open_corpus(tmp_path / "in")
    assert texts(corpus) == LINES
    assert corpus.meta.documents == len(LINES) and corpus.meta.sources == ["a.txt", "b.txt"]
    whole = corpus.read(0, corpus.tokens)
    middle = open_corpus(tmp_path / "in" / "a").tokens
    for start, stop in ((0, middle), (middle - 3, middle + 3), (middle, middle + 5), (middle - 1, corpus.tokens)):
        assert corpus.read(start, stop).tolist() == whole[start:stop].tolist()
    again = pickle.loads(pickle.dumps(corpus))
    assert len(pickle.dumps(corpus)) < 1000
    assert again.read(5, 500).tolist() == whole[5:500].tolist() and again.meta == corpus.meta


def test_a_folder_of_splits_and_folders_that_do_not_do(built, tmp_path, model):
    folder = tmp_path / "splits"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for file in built.parent.glob("c.*"):
            (folder / split / file.name).write_bytes(file.read_bytes())
    assert open_corpus(folder, "test").prefixes == (str(folder / "test" / "c"),)
    with pytest.raises(DataError, match=r"no corpus in .*: make one with"):
        open_corpus(tmp_path / "splits", "other")
    (built.parent / "t.txt").write_text("\n".join(LINES))
    train_tokenizer([built.parent / "t.txt"], tmp_path / "other.model", vocabulary=330)
    build_corpus([built.parent / "t.txt"], tmp_path / "other.model", folder / "train" / "d")
    with pytest.raises(DataError, match="different tokenizers"):
        open_corpus(folder)


def test_a_worker_that_dies_ends_the_run(tmp_path, model, monkeypatch):
    (tmp_path / "t.txt").write_text("\n".join(LINES * 50))
    parent = os.getpid()

    def die(self, texts):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(SentencePieceTokenizer, "encode_batch", die)
    with pytest.raises(DataError, match="a tokenising process died"):
        build_corpus([tmp_path / "t.txt"], model, tmp_path / "c", workers=2)
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_leaves_no_half_corpus_and_no_process(tmp_path, model, number):
    with (tmp_path / "t.txt").open("w") as file:
        for _ in range(4000):
            file.write("\n".join(LINES) + "\n")
    command = [sys.executable, "-m", "pretrain.data.corpus", tmp_path / "t.txt", "--tokenizer", model]
    command += ["--out", tmp_path / "c", "--workers", "2"]
    run = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob(".c.*/c.bin")) and run.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert run.poll() is None, run.stderr.read()
    (os.kill if number == signal.SIGKILL else os.killpg)(run.pid, number)
    _, err = run.communicate(timeout=60)  # its standard error ends with the last process that has it
    assert run.returncode
    if number == signal.SIGINT:
        assert err.strip() == "interrupted: nothing was written"
    assert not list(tmp_path.glob("c.*"))
    if number != signal.SIGKILL:
        assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]
