"""Text fine-tuning: GLUE's files and figures, one's own tables, pairs of texts, numbers to regress, predictions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from finetune import glue
from finetune import sweep as sweeps
from finetune.config import GLUE, Config, load
from finetune.glue import TASKS, judge, read_split
from finetune.predict import predict
from finetune.sweep import Choice, choose, table
from finetune.text import Meaning, TextTask, find_tokenizer, open_texts, travelling
from models.config import HeadConfig
from models.heads import FineTuned
from pretrain import full
from pretrain.checkpoint import CheckpointError
from pretrain.config import BatchPlan
from pretrain.data.names import digest
from pretrain.data.sources import DataError
from pretrain.data.tables import Columns, Texts, read_texts
from pretrain.data.text import SentenceDataset, shares
from pretrain.data.tokenizer import open_tokenizer
from pretrain.full import Full
from pretrain.settings import ConfigError, to_tree
from tests.errors import failure

TINY = "tests/tiny_finetune_text.yaml"
MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
# Task -> file -> its text, in the form in which it is downloaded.
FILES = {
    "CoLA": {
        "train.tsv": 'x01\t1\t\tThe "old" boat sank.\nx02\t0\t*\tBoat the sank "old.\n',
        "dev.tsv": "x03\t0\t??\tSank boat.\n",
        "test.tsv": "index\tsentence\n0\tThe whale dived.\n",
    },
    "MNLI": {
        "train.tsv": MNLI.replace(" ", "\t") + "\tsentence1\tsentence2\tlabel1\tgold_label\n"
        '0\t1\t1n\tfiction\t( a )\t( b )\t(X a)\t(X b)\tHe said "go\tHe spoke.\tentailment\tentailment\n',
        "dev_matched.tsv": MNLI.replace(" ", "\t")
        + "\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
        "0\t1\t1n\tfiction\t(\t(\t(\t(\tIt rains.\tIt is dry.\t-\tneutral\tneutral\t-\t-\tcontradiction\n",
        "test_mismatched.tsv": MNLI.replace(" ", "\t") + "\tsentence1\tsentence2\n"
        "0\t1\t1n\tletters\t(\t(\t(\t(\tA cat.\tAn animal.\n",
    },
    "MRPC": {
        "train.tsv": MRPC + '1\t10\t11\tShe said, "yes.\tYes, she said.\r\n',
        "test.tsv": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t12\t13\tOne.\tTwo.\n",
    },
    "QNLI": {
        "train.tsv": 'index\tquestion\tsentence\tlabel\n0\tWho?\t"Nobody" came.\tnot_entailment\n',
        "test.tsv": "index\tquestion\tsentence\n0\tWhen?\tIn May.\n",
    },
    "QQP": {
        "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "7\t1\t2\tWhat is a \"keel?\tWhat's a keel?\t1\n8\t3\t4\tcut off\n9\t5\t6\tHow?\t\t0\n",
        "test.tsv": "id\tquestion1\tquestion2\n0\tWhy?\tHow come?\n",
    },
    "RTE": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tNo ship sank.\tA ship sank.\tnot_entailment\n",
        "test.tsv": "index\tsentence1\tsentence2\n0\tA.\tB.\n",
    },
    "SST-2": {
        "train.tsv": 'sentence\tlabel\n"hide no charm \t0\n',
        "test.tsv": "index\tsentence\n0\ta gem\n",
    },
    "STS-B": {
        "train.tsv": STSB + "\tscore\n0\tnews\tf\t2012\t0001\tnone\tnone\tA plane.\tAn aeroplane.\t4.250\n",
        "test.tsv": STSB + "\n0\tnews\tf\t2012\t0001\tnone\tnone\tA man.\tA woman.\n",
    },
}
EXPECTED = {
    ("CoLA", "train"): (['The "old" boat sank.', 'Boat the sank "old.'], None, ["1", "0"]),
    ("CoLA", "dev"): (["Sank boat."], None, ["0"]),
    ("CoLA", "test"): (["The whale dived."], None, None),
    ("MNLI", "train"): (['He said "go'], ["He spoke."], ["entailment"]),
    ("MNLI", "dev_matched"): (["It rains."], ["It is dry."], ["contradiction"]),
    ("MNLI", "test_mismatched"): (["A cat."], ["An animal."], None),
    ("MRPC", "train"): (['She said, "yes.'], ["Yes, she said."], ["1"]),
    ("MRPC", "test"): (["One."], ["Two."], None),
    ("QNLI", "train"): (["Who?"], ['"Nobody" came.'], ["not_entailment"]),
    ("QNLI", "test"): (["When?"], ["In May."], None),
    ("QQP", "train"): (['What is a "keel?', "How?"], ["What's a keel?", ""], ["1", "0"]),
    ("QQP", "test"): (["Why?"], ["How come?"], None),
    ("RTE", "train"): (["No ship sank."], ["A ship sank."], ["not_entailment"]),
    ("RTE", "test"): (["A."], ["B."], None),
    ("SST-2", "train"): (['"hide no charm'], None, ["0"]),
    ("SST-2", "test"): (["a gem"], None, None),
    ("STS-B", "train"): (["A plane."], ["An aeroplane."], ["4.250"]),
    ("STS-B", "test"): (["A man."], ["A woman."], None),
}


def word_tokenizer(path: Path) -> Path:
    """Writes one of 400 ids: specials, then words w4 to w399, which are their own numbers."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*specials, *(f"w{i}" for i in range(4, 400))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(specials)
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def text(*numbers: int) -> str:
    return " ".join(f"w{i}" for i in numbers)


def write(folder: Path, **files: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / f"{name}.tsv").write_text("".join(f"{line}\n" for line in lines))
    return folder


def config_of(folder: Path, tokenizer_file: Path | None, *overrides: str) -> Config:
    own = [f"data.path={folder}", "data.labels=null", f"run.dir={folder / 'run'}"]
    return load(TINY, [*own, *([f"text.tokenizer={tokenizer_file}"] if tokenizer_file else []), *overrides])


def refused(call, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def put(folder: Path, task: str) -> Path:
    for name, content in FILES[task].items():
        (folder / name).write_bytes(content.encode())
    return folder


@pytest.mark.parametrize(("task", "split"), EXPECTED, ids=" ".join)
def test_glue_files_are_read_as_they_are_published(tmp_path: Path, task: str, split: str) -> None:
    labelled = not split.startswith("test")
    found = read_split(TASKS[task], put(tmp_path, task), split, labelled)
    assert (found.first, found.second, found.labels) == EXPECTED[task, split]
    assert found.left_out == (1 if (task, split) == ("QQP", "train") else 0)
    if not labelled:
        failure(lambda: read_split(TASKS[task], tmp_path, split), f"{task}'s {split}.tsv has no labels", "predict")


def test_every_task_is_known_by_name_and_its_references_are_codes() -> None:
    assert tuple(TASKS) == GLUE
    for name, split in (pair for pair in EXPECTED if pair[1] == "train"):
        labels = EXPECTED[name, split][2]
        assert labels
        meaning = Meaning(list(TASKS[name].classes), high=glue.HIGHEST)
        references = meaning.references(Texts(Path("x"), labels, None, labels, list(range(len(labels)))))
        if name == "STS-B":
            assert references.tolist() == [pytest.approx(0.85)] and references.dtype == np.float32
        else:
            assert [TASKS[name].classes[code] for code in references] == labels


def test_scores_of_sts_b_are_learned_as_fifths(tmp_path: Path, tokenizer_file: Path) -> None:
    put(tmp_path, "STS-B")
    overrides = ["text.task=STS-B", "eval.splits=[train]"]
    task = TextTask(config_of(tmp_path, tokenizer_file, *overrides), progress=False)
    assert task.train.references.tolist() == [pytest.approx(0.85)]
    text = task.resolved.text
    assert (text.kind, text.range, task.resolved.head.outputs) == ("number", (0, 5), 1)
    assert task.figures == ("pearson", "spearman") and task.best({"pearson": 0.5, "spearman": 0.7}) == pytest.approx(
        0.6
    )


def test_mrpc_as_its_authors_publish_it(tmp_path: Path) -> None:
    rows = ["1\t1\t2\tA.\tB.", "0\t3\t4\tC.\tD.", "1\t5\t6\tE.\tF."]
    content = MRPC + "".join(f"{row}\r\n" for row in rows)
    (tmp_path / "msr_paraphrase_train.txt").write_bytes(content.encode())
    (tmp_path / "msr_paraphrase_test.txt").write_bytes(content.encode())
    task = TASKS["MRPC"]
    assert read_split(task, tmp_path, "train").first == ["A.", "C.", "E."]
    failure(lambda: read_split(task, tmp_path, "dev"), "neither dev.tsv nor msr_paraphrase_train.txt and dev_ids.tsv")
    (tmp_path / "dev_ids.tsv").write_text("3\t4\n9\t9\n")
    train, dev = read_split(task, tmp_path, "train"), read_split(task, tmp_path, "dev")
    assert (train.first, train.second, train.labels, train.lines) == (["A.", "E."], ["B.", "F."], ["1", "1"], [2, 4])
    assert (dev.first, dev.labels) == (["C."], ["0"])
    assert read_split(task, tmp_path, "test").labels == ["1", "0", "1"]  # its authors' tests have labels
    failure(lambda: read_split(task, tmp_path, "extra"), "neither extra.tsv nor a split of that name")


def test_one_folder_for_all_tasks(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "RTE").mkdir()
    put(tmp_path / "RTE", "RTE")
    for folder in (tmp_path, tmp_path / "RTE"):
        assert open_texts(config_of(folder, tokenizer_file, "text.task=RTE"), "train").first == ["No ship sank."]


def test_figures_are_what_their_formulas_say() -> None:
    truth, told = np.array([1, 1, 1, 0, 0, 1, 0, 0, 1, 0]), np.array([1, 0, 1, 0, 1, 1, 0, 1, 1, 0])
    tp, tn, fp, fn = 4, 3, 2, 1
    found = judge(("accuracy", "f1", "matthews"), told, truth)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / root)
    x, y = np.array([0.1, 0.9, 0.4, 0.3, 0.8]), np.array([0.0, 1.0, 0.6, 0.2, 0.5])
    found = judge(("pearson", "spearman"), x, y)
    centred = x - x.mean(), y - y.mean()
    assert found["pearson"] == pytest.approx(
        centred[0] @ centred[1] / math.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    )
    ranks = np.array([1, 5, 3, 2, 4]) - np.array([1, 5, 4, 2, 3])
    assert found["spearman"] == pytest.approx(1 - 6 * (ranks**2).sum() / (5 * 24))
    assert judge(("pearson", "spearman"), np.full(5, 0.5), y) == {"pearson": 0.0, "spearman": 0.0}
    assert judge(("f1", "matthews"), np.zeros(10, int), truth) == {"f1": 0.0, "matthews": 0.0}


def test_pairs_are_encoded_as_roberta_s_template_does(tokenizer_file: Path) -> None:
    """The template and the truncation of the tokenizers library."""
    rng = np.random.default_rng(0)
    sizes = [tuple(map(int, rng.integers(0, 20, 2))) for _ in range(200)]
    first = [text(*rng.integers(4, 400, a)) for a, _ in sizes]
    second = [text(*rng.integers(4, 400, b)) for _, b in sizes]
    template = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    template.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    own = open_tokenizer(tokenizer_file)
    for tokens in (17, 18, 64):
        template.enable_truncation(tokens, strategy="longest_first")
        pairs, single = SentenceDataset(first, own, tokens, second), SentenceDataset(first, own, tokens)
        for i in range(len(first)):
            assert pairs[0, i].inputs.tolist() == template.encode(first[i], second[i]).ids
            assert single[0, i].inputs.tolist() == template.encode(first[i]).ids
        assert pairs.lengths.tolist() == [len(pairs[0, i].inputs) for i in range(len(first))]
        assert pairs.cut == sum(a + b + 4 > tokens for a, b in sizes)
    assert shares(10, 3, 9) == (6, 3) and shares(3, 10, 9) == (3, 6) and shares(10, 10, 9) == (4, 5)
    assert shares(0, 10, 9) == (0, 9) and shares(4, 5, 9) == (4, 5)
    with pytest.raises(DataError, match="5 tokens are too few"):
        SentenceDataset(first, own, 5, second)


def test_texts_encoded_in_several_batches_keep_their_order(tokenizer_file: Path) -> None:
    texts = [text(4 + i % 390, *[5] * (i % 3)) for i in range(2500)]
    found = SentenceDataset(texts, open_tokenizer(tokenizer_file), 24, texts[::-1])
    for i in (0, 999, 1000, 2499):
        assert found[0, i].inputs[1] == 4 + i % 390
        assert found[0, i].inputs[4 + i % 3] == 4 + (2499 - i) % 390


@pytest.mark.parametrize(
    ("columns", "content", "expected"),
    [
        (Columns("text", "", "mood"), 'id\tmood\ttext\n1\tgood\ta "b\n', (['a "b'], None, ["good"])),
        (Columns("3", "1", "2"), "x\tgood\ty\nz\tbad\tw\n", (["y", "w"], ["x", "z"], ["good", "bad"])),
        (Columns(), "good\ta\tb\r\nbad\tc\n", (["a\tb", "c"], None, ["good", "bad"])),
        (Columns("a", "b", "y"), "\ufeffa\tb\ty\nem\u2028pty\t\u0085x\t1\n", (["em\u2028pty"], ["x"], ["1"])),
    ],
)
def test_columns_by_name_or_number(tmp_path: Path, columns: Columns, content: str, expected: tuple) -> None:
    (tmp_path / "a.tsv").write_bytes(content.encode())
    found = read_texts(tmp_path / "a.tsv", columns)
    assert (found.first, found.second, found.labels) == expected


def test_quoted_fields_and_texts_without_labels(tmp_path: Path) -> None:
    file = write(tmp_path, a=["text\tlabel", '"one\ttwo ""three""\nfour"\t1', "five\t0"]) / "a.tsv"
    found = read_texts(file, Columns("text", "", "label"), quoted=True)
    assert (found.first, found.labels, found.lines) == (['one\ttwo "three"\nfour', "five"], ["1", "0"], [3, 4])
    assert read_texts(file, Columns("text"), labelled=False, quoted=True).labels is None
    write(tmp_path, b=["good\tone", "two"])
    assert read_texts(tmp_path / "b.tsv", Columns(), labelled=False).first == ["one", "two"]
    write(tmp_path, c=["text\tlabel", "a\t1", '"open\t1'])
    failure(
        lambda: read_texts(tmp_path / "c.tsv", Columns("text", "", "label"), quoted=True),
        "c.tsv line 3: unexpected end",
    )


NAMED = "text.columns={a: s, label: y}"


@pytest.mark.parametrize(
    ("lines", "overrides", "words"),
    [
        (["s\ty", "a\t1", "b", "c\t0\t1"], [NAMED], ["train.tsv lines 3, 4: not 2 fields, as line 1 has"]),
        (["t\ty", "a\t1"], [NAMED], ["train.tsv has no column s; its first line has t, y"]),
        (["a\tb"], ["text.columns={a: 3, label: 1}"], ["has no column 3; its first line has 2 columns"]),
        (["s\ty"], [NAMED], ["train.tsv has no texts"]),
        (["s\ty", "a\t1", "b\t "], [NAMED], ["train.tsv line 3: no label"]),
        (["s\ty", "a\t1", " \t2"], [NAMED], ["train.tsv line 3: no text"]),
        (["s\ty", "a\t1", "b\t1"], [NAMED], ["all labels of", "are '1'", "nothing to learn"]),
        (["s\ty", "a\t1", "b\tx"], [NAMED, "text.kind=number"], ["train.tsv line 3: label 'x' is no number"]),
        (["s\ty", "a\t1", "b\tinf"], [NAMED, "text.kind=number"], ["train.tsv line 3: label 'inf' is no number"]),
        (["s\ty", "a\t1", "b\t1"], [NAMED, "text.kind=number"], ["are 1: there is nothing to learn"]),
        (["good\ta", "bad"], [], ["train.tsv line 2: not 'label<TAB>text'"]),
        (["good\ta", "bad\tb"], [], ["test.tsv line 2: label 'so so', none of bad, good"]),
        (["good\ta", "bad\tb"], ["eval.splits=[dev]"], ["no dev.tsv or dev.tsv.gz in", "test.tsv, train.tsv"]),
        (
            ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tmaybe"],
            ["text.task=RTE"],
            ["line 2: label 'maybe', none of"],
        ),
        (["index\tsentence1\tsentence2\tlabel", "0\ta"], ["text.task=RTE"], ["train.tsv line 2: not 4 fields"]),
    ],
)
def test_bad_tables_are_one_clear_line(
    tmp_path: Path, tokenizer_file: Path, lines: list[str], overrides: list[str], words: list[str]
) -> None:
    write(tmp_path, train=lines, test=["good\ta", "so so\tb"])
    failure(lambda: TextTask(config_of(tmp_path, tokenizer_file, *overrides), progress=False), *words)


def test_what_is_not_utf_8_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"s\ty\na\t1\n\xff\t1\n")
    failure(lambda: read_texts(tmp_path / "a.tsv", Columns("s", "", "y")), "a.tsv line 3: not UTF-8")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("text.task=WNLI", "know CoLA, MNLI"),
        ("text={task: RTE, columns: {a: x, label: y}}", "RTE knows its columns"),
        ("text={task: RTE, kind: number}", "text.task=RTE has text.kind=classes"),
        ("text.columns={a: x}", "needs a and label"),
        ("text.kind=words", "know classes, number"),
        ("text.range=[1, 1]", "low < high"),
        ("text.max_tokens=25", r"must lie in [6, 24]"),
    ],
)
def test_settings_that_cannot_work(override: str, words: str) -> None:
    refused(lambda: load(TINY, [override]), words)


def test_the_tokenizer_comes_with_the_weights(tmp_path: Path, tokenizer_file: Path) -> None:
    content = tokenizer_file.read_bytes()
    config = config_of(tmp_path, tokenizer_file)
    assert find_tokenizer(config, travelling(config)).content == content
    bare = config_of(tmp_path, None)
    refused(lambda: find_tokenizer(bare, travelling(bare)), "no tokenizer came with the weights", "give text.tokenizer")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_bytes(content)
    assert find_tokenizer(bare, travelling(bare)).content == content
    other = json.loads(content)
    other["model"]["vocab"]["w399x"] = other["model"]["vocab"].pop("w399")
    refused(lambda: find_tokenizer(config, {"tokenizer.json": json.dumps(other).encode()}), "is not tokenizer.json")
    several = {"a-tokenizer.json": content, "tokenizer.json": content}
    refused(lambda: find_tokenizer(bare, several), "several tokenizers: a-tokenizer.json")
    larger = load(TINY, [f"data.path={tmp_path}", "model.text.vocabulary=401"])
    refused(lambda: find_tokenizer(larger, {"tokenizer.json": content}), "has 400 ids", "the model 401")
    start = full.Full(
        FineTuned(config.model, HeadConfig(2)).state_dict(),
        {**to_tree(config), "head": {"outputs": 2}},
        1,
        {"tokenizer.json": content},
    )
    full.write(start, tmp_path / "start.safetensors")
    begun = config_of(tmp_path / "elsewhere", None, f"train.init_from={tmp_path / 'start.safetensors'}")
    assert find_tokenizer(begun, travelling(begun)).content == content


def reviews(folder: Path, count: int = 24) -> Path:
    """Texts of other words for other labels, of 2 to 9 tokens."""
    rng = np.random.default_rng(1)
    labels = ["good" if i % 2 else "bad" for i in range(count)]
    words = {"good": (10, 20), "bad": (20, 30)}
    lines = [f"{label}\t{text(*rng.integers(*words[label], rng.integers(2, 10)))}" for label in labels]
    return write(folder, train=lines, test=lines)


def test_a_batch_is_padded_and_its_loss_is_the_sum(tmp_path: Path, tokenizer_file: Path) -> None:
    lines = [f"good\t{text(7, 8)}", f"bad\t{text(9, 10, 11, 12)}", f"good\t{text(13)}"]
    task = TextTask(config_of(write(tmp_path, train=lines, test=lines), tokenizer_file), progress=False)
    assert task.labels == ["bad", "good"] and task.resolved.head.outputs == 2
    batch = task.collate(task.train.references, [task.train.dataset[0, i] for i in (0, 1, 2)])
    assert batch.inputs.tolist() == [[0, 7, 8, 2, 1, 1], [0, 9, 10, 11, 12, 2], [0, 13, 2, 1, 1, 1]]
    assert batch.lengths is not None and batch.lengths.tolist() == [4, 6, 3]
    assert (batch.targets.tolist(), batch.count) == ([1, 0, 1], 3)
    outputs = torch.tensor([[0.5, -1.0], [2.0, 0.0], [0.0, 0.25]])
    expected = sum(
        math.log(sum(math.exp(v) for v in row)) - row[y] for row, y in zip(outputs.tolist(), (1, 0, 1), strict=True)
    )
    assert task.loss(outputs, batch).item() == pytest.approx(expected, rel=1e-6)
    assert task.predict(outputs, batch) == [0, 0, 1]
    assert task.score("test", [0, 0, 1]) == {"accuracy": pytest.approx(2 / 3)}


def test_numbers_are_learned_from_0_to_1_and_told_as_they_are(tmp_path: Path, tokenizer_file: Path) -> None:
    lines = ["score\ttext", *(f"{score}\t{text(5 + i)}" for i, score in enumerate((-10, 30, 10, 20)))]
    folder = write(tmp_path, train=lines, test=lines)
    overrides = ["text.columns={a: text, label: score}", "text.kind=number"]
    task = TextTask(config_of(folder, tokenizer_file, *overrides), progress=False)
    assert task.resolved.text.range == (-10, 30) and task.resolved.head.outputs == 1 and task.labels == ["number"]
    batch = task.collate(task.train.references, [task.train.dataset[0, i] for i in range(4)])
    assert batch.targets.tolist() == [0, 1, 0.5, 0.75] and batch.targets.dtype == torch.float32
    outputs = torch.tensor([[0.5], [1.5], [0.5], [0.25]])
    assert task.loss(outputs, batch).item() == pytest.approx(0.25 + 0.25 + 0 + 0.25)
    assert task.meaning.told(outputs) == ["10", "50", "10", "0"]
    assert Meaning([], 0, 5, bounded=True).told(torch.tensor([[1.5], [-1.0], [0.5]])) == ["5", "0", "2.5"]
    assert task.score("test", [0.0, 1.0, 0.5, 0.75]) == {"pearson": pytest.approx(1), "spearman": pytest.approx(1)}
    given = TextTask(config_of(folder, tokenizer_file, *overrides, "text.range=[-10, 70]"), progress=False)
    assert given.train.references.tolist() == [0, 0.5, 0.25, 0.375]


def test_some_labels_are_balanced_and_follow_from_the_seed(tmp_path: Path, tokenizer_file: Path) -> None:
    lines = [f"{'bad' if i % 5 else 'good'}\t{text(4 + i)}" for i in range(50)]
    folder = write(tmp_path, train=lines, test=lines)

    def chosen(*overrides: str) -> tuple[TextTask, list[int]]:
        task = TextTask(config_of(folder, tokenizer_file, "data.labels=10", *overrides), progress=False)
        return task, task.train.dataset.indices.tolist()

    task, indices = chosen()
    assert np.bincount(task.train.references[indices]).tolist() == [5, 5] and len(task.train.dataset) == 10
    assert [task.train.dataset[0, i].index for i in range(10)] == indices
    assert chosen()[1] == indices != chosen("train.seed=2")[1]
    assert "more than there are" not in " ".join(chosen("data.labels=50")[0].train.dataset.notes)
    assert chosen("data.labels=51")[0].train.dataset.notes[-1] == "data.labels=51 is more than there are: 50"
    write(tmp_path, train=[f"{i}\t{text(4 + i)}" for i in range(50)], test=lines[:0] or ["1\tw4", "2\tw5"])
    numbers = chosen("text.kind=number")[1]
    assert (
        len(numbers) == 10 and numbers == chosen("text.kind=number")[1] != chosen("text.kind=number", "train.seed=2")[1]
    )


def test_a_resumed_run_meets_the_same_batches(tmp_path: Path, tokenizer_file: Path) -> None:
    config, plan = config_of(reviews(tmp_path), tokenizer_file), BatchPlan(2, 2, 2)

    def batches(first: int, count: int) -> list[list]:
        task = TextTask(config, progress=False)
        keys = iter(task.sampler(plan, rank=1, first_batch=first))
        found = [
            task.collate(task.train.references, [task.train.dataset[key] for key in next(keys)]) for _ in range(count)
        ]
        return [[batch.inputs.tolist(), batch.targets.tolist(), batch.lengths] for batch in found]

    whole, rest = batches(0, 10), batches(3, 4)
    assert str(rest) == str(whole[6:])
    assert str(batches(0, 4)) != str(rest)


def test_the_fingerprint_tells_texts_and_labels(tmp_path: Path, tokenizer_file: Path) -> None:
    lines = [f"good\t{text(7, 8)}", f"bad\t{text(9)}"]
    found = set()
    for number, other in enumerate(
        (lines, [lines[0].replace("good", "bad"), lines[1].replace("bad", "good")], [lines[0], f"bad\t{text(10)}"])
    ):
        folder = write(tmp_path / str(number), train=other, test=other)
        found.add(TextTask(config_of(folder, tokenizer_file), progress=False).train.dataset.fingerprint())
    assert len(found) == 3 and all(len(name) == len(digest()) for name in found)


def test_a_tiny_network_learns_a_tiny_task(tmp_path: Path, tokenizer_file: Path) -> None:
    config = config_of(reviews(tmp_path), tokenizer_file)
    task = TextTask(config, progress=False)
    torch.manual_seed(0)
    network = FineTuned(config.model, task.resolved.head)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    keys = iter(task.sampler(BatchPlan(1, 8, 1), 0, 0))

    def predictions() -> list:
        everything = task.collate(
            task.evaluated["test"].references, [task.evaluated["test"].dataset[0, i] for i in range(24)]
        )
        with torch.no_grad():
            return task.predict(network.eval()(everything.inputs, everything.lengths), everything)

    before = task.score("test", predictions())["accuracy"]
    for _ in range(60):
        batch = task.collate(task.train.references, [task.train.dataset[key] for key in next(keys)])
        loss = task.loss(network.train()(batch.inputs, batch.lengths), batch) / batch.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.8 and task.score("test", predictions()) == {"accuracy": 1.0}


@pytest.mark.parametrize("kind", ["RTE", "STS-B", "own"])
def test_predictions_are_those_of_each_text_alone(tmp_path: Path, tokenizer_file: Path, kind: str) -> None:
    rng, number, paired = np.random.default_rng(2), kind == "STS-B", kind != "own"
    rows = [[rng.integers(4, 400, rng.integers(1, most)).tolist() for most in (30, 9)] for _ in range(30)]
    texts = [[text(*a), text(*b)] for a, b in rows]
    labels = {"RTE": ["entailment", "not_entailment"], "STS-B": ["number"], "own": ["bad", "good"]}[kind]
    if kind == "RTE":
        write(tmp_path, test=["index\tsentence1\tsentence2", *("\t".join(["0", *both]) for both in texts)])
    elif kind == "STS-B":
        write(tmp_path, test=[STSB, *("\t".join(["-"] * 7 + both) for both in texts)])
    else:
        write(tmp_path, new=[a for a, _ in texts])
    config = config_of(tmp_path, None, *([f"text.task={kind}"] if paired else []))
    torch.manual_seed(5)
    network = FineTuned(config.model, HeadConfig(len(labels))).eval()
    outputs = []
    with torch.no_grad():
        for weight in (weight for weight in network.parameters() if weight.ndim > 1):
            weight.mul_(8)
        network.head.linear.weight.mul_(5)
        for a, b in rows:
            left, right = shares(len(a), len(b) if paired else 0, 24 - (4 if paired else 2))
            outputs.append(network(torch.tensor([[0, *a[:left], 2, *([2, *b[:right], 2] if paired else [])]]))[0])
        shift = 0.5 - torch.stack(outputs).mean(dim=0)  # so that not all texts are told to be the same
        network.head.linear.bias += shift
    settings = to_tree(config) | {"head": {"outputs": len(labels), "dropout": 0.0}}
    settings["text"] |= {"kind": "number", "range": [0.0, 5.0]} if number else {}
    assets = {"tokenizer.json": tokenizer_file.read_bytes(), full.LABELS: json.dumps(labels).encode()}
    full.write(Full(network.state_dict(), settings, 3, assets), tmp_path / "model.safetensors")

    files = predict(tmp_path / "model.safetensors", tmp_path / "out", [] if paired else ["new"])

    assert files == [tmp_path / "out" / f"{kind if paired else 'new_predictions'}.tsv"]
    header, *lines = (line.split("\t") for line in files[0].read_text().splitlines())
    assert header == ["index", "prediction"] and [index for index, _ in lines] == [str(i) for i in range(30)]
    shifted = [(output + shift).tolist() for output in outputs]
    if number:
        expected = [min(5.0, max(0.0, 5 * value)) for (value,) in shifted]
        assert [float(value) for _, value in lines] == pytest.approx(expected, abs=1e-3)
        assert 0.0 in expected and 5.0 in expected
    else:
        assert [value for _, value in lines] == [labels[int(b > a)] for a, b in shifted]
    assert len({value for _, value in lines}) > 1


def test_a_model_of_another_kind_predicts_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path, None)
    settings = to_tree(config) | {"task": "image", "head": {"outputs": 2}}
    full.write(Full(FineTuned(config.model, HeadConfig(2)).state_dict(), settings), tmp_path / "a.safetensors")
    refused(lambda: predict(tmp_path / "a.safetensors", tmp_path / "out"), "is no fine-tuned text model")


def test_outputs_without_names_predict_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path, None)
    settings = to_tree(config) | {"head": {"outputs": 2}}
    full.write(Full(FineTuned(config.model, HeadConfig(2)).state_dict(), settings), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"has no labels\.json that names its outputs"):
        predict(tmp_path / "a.safetensors", tmp_path / "out")


def figures(**values: float) -> dict[str, float]:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return {f"best/{n}": v for n, v in named.items()} | {f"last/{n}": 0.0 for n in named} | {"best/step": 9.0}


def test_a_sweep_takes_the_rate_with_the_best_median() -> None:
    trials = {
        "lr1e-05_seed1": figures(dev__accuracy=0.9, dev__f1=0.7),
        "lr1e-05_seed2": figures(dev__accuracy=0.1, dev__f1=0.1),
        "lr1e-05_seed3": figures(dev__accuracy=0.5, dev__f1=0.3),
        "lr2e-05_seed1": figures(dev__accuracy=0.6, dev__f1=0.4),
        "lr2e-05_seed2": figures(dev__accuracy=0.4, dev__f1=0.6),
        "lr2e-05_seed3": figures(dev__accuracy=0.3, dev__f1=0.3),
    }
    choice = choose("MRPC", trials)
    assert choice.lr == "2e-05" and choice.medians == {"1e-05": pytest.approx(0.4), "2e-05": pytest.approx(0.5)}
    assert choice.score == pytest.approx(0.5) and choice.figures == {"dev/accuracy": 0.4, "dev/f1": 0.4}
    both = choose("MNLI", {"lr1e-05_seed1": figures(dev_matched__accuracy=0.8, dev_mismatched__accuracy=0.7)})
    lines = table([choice, both]).splitlines()
    assert lines[2] == "| MRPC | 2e-05 | dev/accuracy 40.0, dev/f1 40.0 | 50.0 | 6 |"
    assert lines[3].startswith("| MNLI | 1e-05 | dev_matched/accuracy 80.0, dev_mismatched/accuracy 70.0 | 75.0 |")
    assert lines[4] == "| average of 2 | | | 62.5 | |"
    every = [Choice(task, "1e-05", i / 10, {}, {}, {}) for i, task in enumerate(GLUE)]
    assert table(every).splitlines()[-1] == "| GLUE average | | | 35.0 | |"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{own}", "--lr", "fast"], "--lr 'fast' is no positive number"),
        (["{own}", "--lr", "-1"], "--lr '-1' is no positive number"),
        (["{own}", "--lr", "1e-4", "--seeds", "0"], "--seeds 0 should be 1 or more"),
        (["tests/tiny_finetune.yaml", "--lr", "1e-4"], "has task=image; a sweep is of text tasks"),
        (["{own}", "{own}", "--lr", "1e-4"], "configs should have different names: tiny_finetune_text, tiny_finetune_"),
        (["{own}", "--lr", "1e-4", "text.taks=RTE"], "unknown key text.taks; did you mean text.task?"),
    ],
)
def test_bad_words_of_a_sweep_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], told: str
) -> None:
    given = [word.replace("{own}", TINY) for word in words]
    monkeypatch.setattr("sys.argv", ["sweep", *given, "--out", str(tmp_path / "out")])
    assert sweeps.main() == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error
