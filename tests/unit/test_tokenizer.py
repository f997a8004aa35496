"""Tokenizers: conventions of ids, RoBERTa's order against the algorithm written out, training on the user's text."""

import gzip
import hashlib
import json
import lzma
import pickle
import random
import re
from itertools import pairwise

import pytest
import sentencepiece
import tokenizers

from pretrain.data.sources import DataError
from pretrain.data.tokenizer import check_roberta, main, open_tokenizer, roberta_tokenizer, train_tokenizer

WORDS = "the whale sea ship captain said harpoon ocean white men old night hand time boat water great head Ahab 1851 ?!"
rng = random.Random(0)
LINES = [" ".join(rng.choices(WORDS.split(), k=12)) + f", it's {n}." for n in range(400)]
HARD = [
    "",
    " ",
    "a",
    "  two  spaces ",
    "it's THE whale's\n\n\tsea",
    "naïve 鯨 🐋 x\u00a0y",
    "</s> <s> <mask>",
    "\x00\x07",
    "12ab34",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "moby.txt"
    file.write_text("\n".join(LINES) + "\n")
    return file


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """encoder.json, vocab.bpe and dict.txt as GPT-2's and RoBERTa's, of a small vocabulary."""
    folder = tmp_path_factory.mktemp("published")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(LINES, vocab_size=400, show_progress=False)
    trained.add_tokens(["<|endoftext|>"])
    trained.save_model(str(folder))
    (folder / "vocab.json").rename(folder / "encoder.json")
    (folder / "merges.txt").rename(folder / "vocab.bpe")
    encoder = json.loads((folder / "encoder.json").read_text())
    ids = list(encoder.values())
    random.Random(1).shuffle(ids)
    lines = [f"{i} {1000 - n}" for n, i in enumerate(ids)] + ["madeupword0000 0", "madeupword0001 0"]
    (folder / "dict.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def roberta(published):
    out = published / "roberta.json"
    roberta_tokenizer(published / "encoder.json", published / "vocab.bpe", published / "dict.txt", out)
    return open_tokenizer(out)


def gpt2_ids(text, encoder, merges):
    """GPT-2's encoding written out: words, bytes as characters, the best-ranked pair merged until there is none."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    characters = {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(rest)}
    letter, digit = r"[^\W\d_]", r"\d"
    other = rf"(?:(?!{letter}|{digit})\S)"
    words = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{letter}+| ?{digit}+| ?{other}+|\s+(?!\S)|\s+"
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    ids = []
    for word in re.findall(words, text):
        parts = [characters[b] for b in word.encode()]
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: ranks.get(pair, 1 << 30))
            if best not in ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                pair = tuple(parts[i : i + 2]) == best
                merged.append("".join(parts[i : i + 1 + pair]))
                i += 1 + pair
            parts = merged
        ids += [encoder[part] for part in parts]
    return ids


def test_roberta_ids_are_gpt2_ids_through_the_dictionary(published, roberta):
    encoder = json.loads((published / "encoder.json").read_text())
    merges = [tuple(line.split()) for line in (published / "vocab.bpe").read_text().splitlines()[1:]]
    words = [line.split()[0] for line in (published / "dict.txt").read_text().splitlines()]
    place = {word: 4 + n for n, word in enumerate(words)}
    texts = LINES[:50] + HARD
    expected = [[place[str(i)] for i in gpt2_ids(text, encoder, merges)] for text in texts]
    assert roberta.encode_batch(texts) == expected
    assert [roberta.decode([roberta.bos, *ids, roberta.eos]) for ids in expected] == texts
    assert (roberta.bos, roberta.pad, roberta.eos, roberta.unk) == (0, 1, 2, 3)
    assert roberta.vocabulary == 4 + len(words) + 1  # <mask> last
    assert len({i for ids in expected for i in ids}) > 100


def test_check_names_the_first_difference(published, roberta, tmp_path, capsys):
    main(["check", str(roberta.path), str(published / "encoder.json"), str(published / "dict.txt")])
    assert f"all {roberta.vocabulary} ids are in the published order" in capsys.readouterr().out
    lines = (published / "dict.txt").read_text().splitlines()
    lines[10], lines[11] = lines[11], lines[10]
    (tmp_path / "dict.txt").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"roberta\.json: id 14 is '.+', in the published order it is '.+'"):
        check_roberta(roberta.path, published / "encoder.json", tmp_path / "dict.txt")
    (tmp_path / "dict.txt").write_text((published / "dict.txt").read_text() + "madeupword0002 0\n")
    with pytest.raises(DataError, match="is '<mask>', in the published order it is 'madeupword0002'"):
        check_roberta(roberta.path, published / "encoder.json", tmp_path / "dict.txt")


def test_check_notices_a_space_put_in_front(published, roberta, tmp_path):
    content = json.loads(roberta.path.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="add_prefix_space"):
        check_roberta(tmp_path / "t.json", published / "encoder.json", published / "dict.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [("17", r"line 3 is '17'"), ("99999 1", "GPT-2 id 99999 is not in"), ("{first}", "lists a token twice")],
)
def test_a_bad_dictionary(published, tmp_path, line, message):
    lines = (published / "dict.txt").read_text().splitlines()
    lines.insert(2, line.format(first=lines[0]))
    (tmp_path / "dict.txt").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        roberta_tokenizer(published / "encoder.json", published / "vocab.bpe", tmp_path / "dict.txt", tmp_path / "o")
    lost = [line for line in lines[3:] if not line.startswith("madeup")]
    (tmp_path / "dict.txt").write_text("\n".join(lost[:200]))
    with pytest.raises(DataError, match=r"lacks .* tokens that"):
        roberta_tokenizer(published / "encoder.json", published / "vocab.bpe", tmp_path / "dict.txt", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_foreign_json_may_ask_for_truncation_and_padding(roberta, tmp_path):
    foreign = tokenizers.Tokenizer.from_file(str(roberta.path))
    foreign.enable_truncation(4)
    foreign.enable_padding(length=64)
    foreign.save(str(tmp_path / "t.json"))
    assert open_tokenizer(tmp_path / "t.json").encode_batch(LINES[:3]) == roberta.encode_batch(LINES[:3])


def test_a_json_without_special_tokens_is_refused(roberta, tmp_path):
    content = json.loads(roberta.path.read_text().replace('"<pad>"', '"[PAD]"').replace('"</s>"', '"stop"'))
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"t\.json lacks the special tokens </s> or \[SEP\]$"):
        open_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_trained_models_have_the_convention_and_lose_no_text(text, tmp_path, kind):
    train_tokenizer([text], tmp_path / "a.model", vocabulary=360, kind=kind)
    train_tokenizer([text], tmp_path / "b.model", vocabulary=360, kind=kind)
    tokenizer = open_tokenizer(tmp_path / "a.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert tokenizer.fingerprint == hashlib.sha256((tmp_path / "a.model").read_bytes()).hexdigest()
    assert (tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.unk, tokenizer.vocabulary) == (0, 1, 2, 3, 360)
    texts = [*LINES[:20], "naïve 鯨 🐋", "</s> <pad>"]
    ids = tokenizer.encode_batch(texts)
    assert min(map(min, ids)) > 3
    assert [tokenizer.decode([0, *i, 2, 1]) for i in ids] == texts
    assert pickle.loads(pickle.dumps(tokenizer)).encode_batch(texts) == ids


def test_of_much_text_the_same_part_is_drawn_again(text, tmp_path):
    contents = []
    for run, sentences in enumerate((150, 150, 150, len(LINES))):
        train_tokenizer([text], tmp_path / f"{run}.model", vocabulary=340, sentences=sentences)
        model = sentencepiece.SentencePieceProcessor(str(tmp_path / f"{run}.model"))
        contents.append([(model.id_to_piece(i), model.get_score(i)) for i in range(340)])
    assert contents[0] == contents[1] == contents[2] != contents[3]


def test_training_reads_what_the_corpus_reads(text, tmp_path):
    half = len(LINES) // 2
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt.gz").write_bytes(gzip.compress("\n".join(LINES[:100]).encode()))
    (tmp_path / "in/b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES[100:half]))
    (tmp_path / "in/c.txt.xz").write_bytes(lzma.compress(b"bad \xff line\n" + "\n".join(LINES[half:]).encode()))
    reader = train_tokenizer([tmp_path / "in"], tmp_path / "a.model", vocabulary=360)
    train_tokenizer([text], tmp_path / "b.model", vocabulary=360)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert reader.summary() == f"1 lines that are not UTF-8 (first: {tmp_path}/in/c.txt.xz line 1)"


def test_long_lines_are_trained_on_too(tmp_path):
    """SentencePiece by itself leaves out what is above 4 KB."""
    (tmp_path / "one.txt").write_text(" ".join(LINES))
    train_tokenizer([tmp_path / "one.txt"], tmp_path / "a.model", vocabulary=360)
    assert "▁harpoon" in sentencepiece.SentencePieceProcessor(str(tmp_path / "a.model")).id_to_piece(list(range(360)))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    ("content", "vocabulary", "message"),
    [
        ("few words only", 8000, r"a vocabulary of 8,000 is too large for this text, which gives at most \d+$"),
        (
            "".join(map(chr, range(0x4E00, 0x4F00))),
            300,
            r"a vocabulary of 300 is too small for this text, .* at least 517",
        ),
        ("", 300, "no text in 1 file"),
        (" \n\0\n", 300, "no text in 1 file.*2 NUL"),
    ],
)
def test_text_that_a_vocabulary_cannot_be_had_from(tmp_path, capsys, kind, content, vocabulary, message):
    (tmp_path / "t.txt").write_text(content.replace("\0", "\0\0"))
    out = tmp_path / "x.model"
    arguments = ["train", str(tmp_path / "t.txt"), "--vocabulary", str(vocabulary), "--out", str(out), "--type", kind]
    with pytest.raises(SystemExit, match=message) as stopped:
        main(arguments)
    assert "\n" not in str(stopped.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "t.txt"]


@pytest.mark.parametrize(
    "wrong", [{"vocabulary": 0}, {"character_coverage": 3}, {"character_coverage": 0}, {"sentences": 100}]
)
def test_numbers_that_no_training_takes(tmp_path, text, wrong):
    with pytest.raises(DataError, match=r"^a vocabulary of [^\n]*: give 1 id or more"):
        train_tokenizer([text], tmp_path / "x.model", **({"vocabulary": 360} | wrong))


def test_a_failing_file_stops_training_with_its_own_line(tmp_path, text):
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(text.read_bytes())[:-30])
    with pytest.raises(DataError, match=r"^cannot read .*t\.txt\.gz: Compressed file ended"):
        train_tokenizer([tmp_path / "t.txt.gz"], tmp_path / "x.model", vocabulary=360)


def test_what_a_foreign_model_lacks_is_appended(text, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=100, bos_id=-1, pad_id=-1, eos_id=-1, unk_id=0,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(str(tmp_path / "m.model")).get_piece_size()
    tokenizer = open_tokenizer(tmp_path / "m.model")
    assert (tokenizer.unk, tokenizer.bos, tokenizer.pad, tokenizer.eos) == (0, size, size + 1, size + 2)
    assert tokenizer.vocabulary == size + 3
    assert tokenizer.decode([size, *tokenizer.encode_batch(["the whale"])[0], size + 2, size + 1]) == "the whale"


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.model", b"no model"), ("b.model", b""), ("c.json", b"{}"), ("d.json", b"\xff"), ("e", None)],
)
def test_what_is_no_tokenizer(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"(is no |cannot read tokenizer ).*{name}|{name} is no ") as error:
        open_tokenizer(tmp_path / name)
    assert "\n" not in str(error.value)
