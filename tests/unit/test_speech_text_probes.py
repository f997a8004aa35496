"""Probes of speech and text: padding changes nothing, order is kept, baselines are what they say, runs get pictures."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import soundfile
import torch
from scipy.sparse import csr_matrix, issparse

from finetune import probe as probes
from finetune import report as reports
from finetune.features import FrozenEncoder, extract_each, load_encoder
from finetune.probe import ProbeTable, compare, knn_accuracy, labelled_data, linear_accuracy
from finetune.report import choose_samples
from finetune.text_panels import SPECIALS, drawable, pieces, whole_words
from models.config import RATE
from models.data2vec import Data2Vec
from pretrain.checkpoint import CheckpointError
from pretrain.config import Config, load
from pretrain.data.corpus import main as make_corpus
from pretrain.data.sources import DataError, Sample
from pretrain.data.text import Sentences
from pretrain.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from pretrain.labelled.audio import AUDIO, shortest
from pretrain.labelled.mfcc import BANDS, FFT, HOP, WINDOW, dct, deltas, log_mel, mel_bands, mfcc, mfcc_statistics
from pretrain.labelled.modality import MODALITIES
from pretrain.labelled.samples import Inputs, NoProbe, like_sized
from pretrain.labelled.text import TEXT, SentenceTexts, find_tokenizer
from pretrain.pieces import file as shard_file
from pretrain.saved import find
from pretrain.settings import ConfigError
from tests.unit.test_probe import is_a_picture, write_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.prenet_depth=0",
    "model.extra_tokens=0",
    "model.norm_eps=1e-5",
    "model.loss.cls=0",
    "model.targets={instance_norm_layer: true, layer_norm: false, top_k_layers: 2}",
]
GOOD, BAD = ["lovely", "warm", "funny", "brilliant"], ["dreadful", "cold", "tedious", "awful"]
FILLING = ["the", "film", "was", "a", "story", "of", "its", "time", "and", "place"]


def audio_config(path: Path, *overrides: str) -> Config:
    audio = "model.audio={seconds: 2, channels: 16, position_layers: 2, position_groups: 4}"
    mask = "model.mask={prob: 0.5, adjust: 0.05, length: 5, inverse: false}"
    rest = ["model.modality=audio", "data.audio.min_seconds=1", "train.micro_batch=64000", "train.batch_size=64000"]
    return load(ROOT / "tests/tiny.yaml", [*SMALL, audio, mask, *rest, f"data.path={path}", *overrides])


def text_config(path: Path, *overrides: str) -> Config:
    mask = "model.mask={prob: 0.5, adjust: 0, length: 1, inverse: true}"
    text = ["model.modality=text", "model.text={vocabulary: 330, tokens: 24}"]
    return load(ROOT / "tests/tiny.yaml", [*SMALL, mask, *text, f"data.path={path}", *overrides])


def model_of(config: Config) -> Data2Vec:
    """With a teacher that is not the student."""
    torch.manual_seed(3)
    model = Data2Vec(config.model)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def write_tones(folder: Path, count: int = 5) -> Path:
    """Two classes of clips of 0.3 to 1.5 s: low tones, and high ones."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, low in (("high", 2000), ("low", 200)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count if split == "train" else 3):
                t = np.arange(int(RATE * rng.uniform(0.3, 1.5))) / RATE
                tone = 0.3 * np.sin(2 * math.pi * low * rng.uniform(1, 1.5) * t)
                wave = tone + 0.01 * rng.standard_normal(len(t))
                soundfile.write(folder / split / name / f"{i}.wav", wave, RATE)
    return folder


def sentence(rng: np.random.Generator, words: list[str]) -> str:
    filling = rng.choice(FILLING, int(rng.integers(2, 14)))
    return " ".join([*filling, rng.choice(words)])


def write_sentences(folder: Path, train: int = 40, test: int = 12) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for split, count in (("train", train), ("test", test)):
        lines = [f"{'ny'[i % 2]}\t{sentence(rng, (BAD, GOOD)[i % 2])}\n" for i in range(count)]
        (folder / f"{split}.tsv").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """labelled/ sentences, a corpus and its tokenizer t.model."""
    folder = tmp_path_factory.mktemp("language")
    write_sentences(folder / "labelled")
    rng = np.random.default_rng(2)
    text = "".join(sentence(rng, GOOD + BAD) + ".\n" for _ in range(400))
    (folder / "plain.txt").write_text(text)
    train_tokenizer([folder / "plain.txt"], folder / "t.model", vocabulary=330)
    make_corpus([str(folder / "plain.txt"), "--tokenizer", str(folder / "t.model"), "--out", str(folder / "corpus")])
    return folder


def encoder_of(config: Config) -> FrozenEncoder:
    return FrozenEncoder(model_of(config).student, config.model, torch.device("cpu"))


# Batches


def test_like_sized_batches_are_all_and_bounded() -> None:
    sizes = np.random.default_rng(0).integers(1, 100, 500)
    batches = like_sized(sizes, 16, 400)
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(len(b) <= 16 and (len(b) == 1 or len(b) * sizes[b].max() <= 400) for b in batches)
    assert len(batches) < 1.5 * max(500 / 16, sizes.sum() / 400)
    assert [b.tolist() for b in like_sized(np.array([7, 900, 8]), 16, 100)] == [[1], [2, 0]]
    assert [b.tolist() for b in like_sized(np.zeros(5, int), 2, 0)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_padding_changes_nothing(modality: str, tones: Path, language: Path) -> None:
    config = audio_config(tones, "model.audio.position_layers=0") if modality == "audio" else text_config(language)
    inputs = [torch.randn(n) for n in (9000, 20_000, 4321)]
    if modality == "text":
        inputs = [torch.randint(4, 330, (n,)) for n in (7, 24, 2)]
    frozen = encoder_of(config)
    samples = [Sample(x, 0, i) for i, x in enumerate(inputs)]
    batch = MODALITIES[modality].collate(config.model, samples)
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [config.model.grid(len(x))[0] for x in inputs]
    alone = torch.cat([frozen(x[None]) for x in inputs])
    torch.testing.assert_close(frozen.represent(batch), alone, rtol=1e-4, atol=1e-5)
    pooled = torch.cat([frozen.features(x[None]).pooled for x in inputs])
    torch.testing.assert_close(frozen.features(batch.inputs, -1, batch.lengths).pooled, pooled, rtol=1e-4, atol=1e-5)
    if modality == "text":
        torch.testing.assert_close(alone, pooled)


def test_whatever_lies_in_the_padding_changes_nothing(tones: Path) -> None:
    config = audio_config(tones)
    frozen = encoder_of(config)
    inputs = [torch.randn(30_000), torch.randn(24_000)]
    batch = AUDIO.collate(config.model, [Sample(x, 0, i) for i, x in enumerate(inputs)])
    silent = frozen.represent(batch)
    batch.inputs[1, 24_000:] = 5 * torch.randn(6000)
    torch.testing.assert_close(frozen.represent(batch), silent)
    alone = frozen(inputs[1][None])[0]
    assert 0 < (alone - silent[1]).norm() < 0.1 * alone.norm()  # convolutions see zeros where a clip's end is its edge


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_order_is_kept(modality: str, tones: Path, language: Path) -> None:
    config = audio_config(tones) if modality == "audio" else text_config(language / "corpus")
    data = labelled_data(config, "" if modality == "audio" else str(language / "labelled"))
    lengths = MODALITIES[modality].sizes(data.train)
    assert lengths.tolist() == [len(data.train[0, i].inputs) for i in range(len(data.train))]
    ids = [3, 9, 1, 3, 6]

    def length(batch: Inputs) -> torch.Tensor:
        return torch.tensor([[len(sample.inputs)] for sample in batch.samples])

    def place(batch: Inputs) -> csr_matrix:
        return csr_matrix([[sample.index] for sample in batch.samples])

    (found, places), genuine = extract_each([length, place], data.train, config.model, 2, indices=ids)
    assert genuine.all()
    assert found[:, 0].tolist() == lengths[ids].tolist()
    assert issparse(places) and places.toarray()[:, 0].tolist() == ids


def test_mean_and_deviation_are_over_frames_of_the_sum_of_normalised_states() -> None:
    state = torch.randn(2, 3, 8)
    other = 100 * torch.randn(2, 3, 8) + 7
    total = sum((x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True) for x in (state, other))
    seen = AUDIO.seen(iter([state, other]), torch.tensor([2, 3]), audio_config(Path()).model)
    wanted = [torch.cat([x.mean(0), x.std(0, correction=0)]) for x in (total[0, :2], total[1])]
    torch.testing.assert_close(seen, torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_read_is_left_out_of_probes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tones = write_tones(tmp_path / "tones")
    for name, samples in (("train/high/1", 8000), ("test/low/0", 9000), ("test/low/2", 9000)):
        soundfile.write(tones / f"{name}.wav", np.zeros(samples), RATE)
    config = audio_config(tones)
    write_checkpoint(tmp_path / "run", model_of(config), config, 1)
    table = compare(tmp_path / "run", ["all"])
    assert (table.train_images, table.test_images) == (9, 4)
    told = capsys.readouterr().out
    assert "left out 1 training clips that cannot be read" in told and "left out 2 test clips" in told


def test_splits_that_share_samples_are_refused(tmp_path: Path, tones: Path, language: Path) -> None:
    for split, clips in (("train", ("high/0", "low/0")), ("test", ("high/0", "low/1"))):
        lines = "".join(f"{clip}.wav\t9000\n" for clip in clips)
        (tmp_path / f"{split}.tsv").write_text(f"{tones}/train\n{lines}")
    with pytest.raises(NoProbe, match=r"1 of 2 test clips of .* are training clips too"):
        labelled_data(audio_config(tmp_path))
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_text(f"y\tthe same\nn\tsomething {split}\n")
    with pytest.raises(NoProbe, match=r"1 of 2 test sentences of .* are training sentences too"):
        labelled_data(text_config(language / "corpus"), str(tmp_path))


def test_sentences_without_words_have_no_baseline(language: Path) -> None:
    tokenizer = open_tokenizer(language / "t.model")
    silent = SentenceTexts(Sentences(["鯨", "a b!"], np.array([0, 1]), ["n", "y"]), tokenizer, 24)
    with pytest.raises(NoProbe, match=r"no words .* in the training sentences"):
        TEXT.plain(silent, [0, 1])


# Baselines


def test_dct_is_scipys() -> None:
    x = torch.randn(7, BANDS, dtype=torch.float64)
    wanted = scipy.fft.dct(x.numpy(), type=2, norm="ortho")
    np.testing.assert_allclose(x @ dct(BANDS).double().T, wanted, rtol=1e-5, atol=1e-5)


def test_mel_bands_are_triangles() -> None:
    bands = mel_bands()
    assert bands.shape == (BANDS, FFT // 2 + 1) and bands.min() >= 0 and bands.max() <= 1
    frequencies = np.arange(FFT // 2 + 1) * RATE / FFT
    mel = 2595 * np.log10(1 + np.array([20, 8000]) / 700)
    corners = 700 * (10 ** (np.linspace(*mel, BANDS + 2) / 2595) - 1)
    for band, left, centre, right in zip(bands.numpy(), corners, corners[1:], corners[2:], strict=False):
        np.testing.assert_allclose(band, np.interp(frequencies, [left, centre, right], [0, 1, 0]), atol=1e-6)


def test_a_tone_is_in_its_band() -> None:
    t = torch.arange(RATE) / RATE
    loudest = [int(log_mel(torch.sin(2 * math.pi * f * t)).mean(dim=0).argmax()) for f in (300, 1000, 4000)]
    centres = mel_bands().argmax(dim=1) * RATE / FFT
    np.testing.assert_allclose(centres[loudest], [300, 1000, 4000], atol=RATE / FFT)


def test_log_mel_of_an_impulse_is_known() -> None:
    """Emphasis makes two samples of one, w(k) and -0.97 w(k+1), whose power is |a + b exp(-iw)|^2."""
    waveform = torch.zeros(WINDOW + HOP)
    waveform[100] = 1.0
    window = np.hanning(WINDOW)
    angle = 2 * math.pi * np.arange(FFT // 2 + 1) / FFT
    for frame, at in enumerate((100, 100 - HOP)):
        if at >= 0:
            power = np.abs(window[at] - 0.97 * window[at + 1] * np.exp(-1j * angle)) ** 2
            np.testing.assert_allclose(log_mel(waveform)[frame], np.log(mel_bands().numpy() @ power), rtol=2e-4)
    assert log_mel(waveform).shape == (2, BANDS)


def test_louder_changes_only_the_first_coefficient() -> None:
    x = torch.randn(4000)
    change = mfcc(10 * x) - mfcc(x)
    wanted = torch.zeros_like(change)
    wanted[:, 0] = 2 * math.log(10) * math.sqrt(BANDS)
    torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-3)


def test_deltas_are_slopes() -> None:
    line = torch.arange(12.0)[:, None] * torch.tensor([2.0, -1.0])
    torch.testing.assert_close(deltas(line)[2:-2], torch.tensor([[2.0, -1.0]]).expand(8, 2))
    assert mfcc_statistics(torch.randn(WINDOW)).isfinite().all() and mfcc_statistics(torch.randn(100)).shape == (80,)


def test_words_are_those_of_the_training_texts(language: Path) -> None:
    tokenizer = open_tokenizer(language / "t.model")

    def of(*texts: str) -> SentenceTexts:
        return SentenceTexts(Sentences(list(texts), np.zeros(len(texts), np.int64), []), tokenizer, 24)

    train = of("good film", "bad film", "unused words")
    bag = TEXT.plain(train, [0, 1])
    found = bag(Inputs(torch.zeros(1), None, [of("good unused unknown")[0, 0], of("film")[0, 0]]))
    assert issparse(found) and found.shape == (2, 3)  # bad, film, good
    assert found.toarray()[0].tolist() == [0, 0, 1] and found.toarray()[1].tolist() == [0, 1, 0]


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_accuracy])
def test_sparse_features_stay_sparse(accuracy, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    y = np.arange(60) % 3
    rng = np.random.default_rng(0)
    x = csr_matrix(np.eye(3, 5000, dtype=np.float32)[y] + (rng.random((60, 5000)) < 0.001))
    monkeypatch.setattr(csr_matrix, "toarray", lambda *_: pytest.fail("filled"))
    assert accuracy(x[:40], y[:40], x[40:], y[40:]) > 0.85


# Runs


@pytest.mark.parametrize("modality", ["audio", "text"])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_teacher_comes_with_the_students_local_encoder(
    tmp_path: Path, tones: Path, language: Path, modality: str, which: str
) -> None:
    config = audio_config(tones) if modality == "audio" else text_config(language / "corpus")
    model = model_of(config)
    path = write_checkpoint(tmp_path, model, config, ranks=2)
    inputs = torch.randn(2, 8000) if modality == "audio" else torch.randint(4, 330, (2, 9))
    with torch.no_grad():
        wanted = getattr(model, which)(model.student.local(inputs))
    torch.testing.assert_close(load_encoder(path, which).features(inputs).positions.cpu(), wanted)
    shard_file(path, 1).unlink()
    with pytest.raises(CheckpointError, match=r"values of (teacher|master)/|missing: "):
        load_encoder(path, which)


def test_probe_of_speech(tmp_path: Path, tones: Path) -> None:
    config = audio_config(tones)
    write_checkpoint(tmp_path, model_of(config), config, ranks=1)
    table = compare(tmp_path)
    assert (table.baseline, table.unit, table.train_images, table.test_images) == ("MFCCs", "clips", 10, 6)
    assert table.rows[table.baseline]["knn"]["all"].mean == 1.0
    assert "10 training clips" in str(table) and "MFCCs under" in table.verdict
    assert ProbeTable.read(tmp_path / "probe.json") == table


def test_short_clips_count_too(tones: Path) -> None:
    data = labelled_data(audio_config(tones))
    assert len(data.train) == 10 and min(data.train.lengths) < RATE  # data.audio.min_seconds is pre-training's
    config = audio_config(tones).model
    assert shortest(config) == WINDOW and config.audio.frames(WINDOW) == 1 and config.audio.frames(WINDOW - 1) == 0


def test_probe_of_text_on_other_data(tmp_path: Path, language: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = text_config(language / "corpus")
    write_checkpoint(tmp_path, model_of(config), config, ranks=1)
    monkeypatch.setattr(sys, "argv", ["probe", str(tmp_path), "--data", str(language / "labelled"), "--labels", "all"])
    assert probes.main() == 0
    table = ProbeTable.read(tmp_path / "probe.json")
    assert (table.baseline, table.unit, table.classes) == ("bag of words", "sentences", ["n", "y"])
    assert table.rows["bag of words"]["linear"]["all"].mean == 1.0
    found = find(tmp_path)
    again = reports.probed(found, str(language / "labelled"))
    assert again == table
    monkeypatch.setattr(reports, "compare", lambda *_, **given: given)
    assert reports.probed(found, "elsewhere") == {"data_path": "elsewhere"}


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_report(modality: str, tmp_path: Path, tones: Path, language: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = audio_config(tones) if modality == "audio" else text_config(language / "corpus")
    write_checkpoint(tmp_path, model_of(config), config, ranks=1)
    monkeypatch.setattr(probes, "COUNTS", ("all",))
    assert is_a_picture(reports.report(tmp_path, "" if modality == "audio" else str(language / "labelled")))


def test_a_corpus_without_labels_shows_its_own_text(tmp_path: Path, language: Path) -> None:
    config = text_config(language / "corpus")
    write_checkpoint(tmp_path, model_of(config), config, ranks=1)
    shown, note = choose_samples(find(tmp_path))
    assert note.startswith("no probe without labelled sentences") and "--data" in note and "\n" not in note
    assert shown.kind == "training" and shown.same(0, 0) is None
    text = (language / "plain.txt").read_text().replace("\n", "")
    assert all(shown.query(row).text.split(". ")[0].split(".")[0] in text for row in range(len(shown.query_ids)))


# Tokenizers


def test_the_runs_copy_of_the_tokenizer_comes_first(tmp_path: Path, language: Path) -> None:
    config = text_config(language / "corpus")
    assert find_tokenizer(config, None).path == language / "corpus.model"
    assert find_tokenizer(config, tmp_path).path == language / "corpus.model"
    shutil.copy(language / "t.model", tmp_path / "copy.model")
    assert find_tokenizer(config, tmp_path).path == tmp_path / "copy.model"
    shutil.copy(language / "t.model", tmp_path / "second.model")
    with pytest.raises(ConfigError, match=r"several tokenizers: .*copy\.model, .*second\.model"):
        find_tokenizer(config, tmp_path)


def test_bad_input_is_one_line(tmp_path: Path, tones: Path, language: Path) -> None:
    (tmp_path / "half").mkdir()
    shutil.copy(language / "labelled/train.tsv", tmp_path / "half")
    shutil.copytree(language / "labelled", tmp_path / "same")
    shutil.copy(tmp_path / "same/train.tsv", tmp_path / "same/test.tsv")
    shutil.copytree(tones / "train/low", tmp_path / "plain")
    shutil.copytree(tones / "train", tmp_path / "classes")
    labelled, corpus = str(language / "labelled"), language / "corpus"
    other = "model.text.vocabulary=331"
    for config, path, error, words in (
        (text_config(corpus), str(tmp_path / "half"), NoProbe, r"no test\.tsv"),
        (text_config(corpus), str(tmp_path / "same"), NoProbe, "are training sentences too"),
        (text_config(corpus), "", NoProbe, r"no train\.tsv .*--data"),
        (text_config(corpus, other), labelled, ConfigError, "330 ids .* 331 .*not this model.s tokenizer"),
        (text_config(tmp_path / "gone"), labelled, DataError, r"no tokenizer: no \*\.model or .*does not exist"),
        (audio_config(tmp_path / "plain"), "", NoProbe, "clips of .* have no labels"),
        (audio_config(tmp_path / "classes"), "", NoProbe, "are training clips too"),
        (audio_config(tmp_path / "gone"), "", DataError, "does not exist"),
    ):
        with pytest.raises(error, match=words) as raised:
            labelled_data(config, path, tmp_path)
        assert "\n" not in str(raised.value)


# What the picture says of tokens


def test_pieces_are_the_text(language: Path) -> None:
    tokenizer = open_tokenizer(language / "t.model")
    text = "the film was naïve … tedious"
    ids = [tokenizer.bos, *tokenizer.encode_batch([text])[0], tokenizer.eos]
    parts = pieces(tokenizer, ids)
    assert len(parts) == len(ids) and parts[0] == SPECIALS[0] and parts[-1] == SPECIALS[1]
    assert parts[1] == "the" and parts[2] == " film"


class Letters(Tokenizer):
    """What `pieces` needs of one."""

    def __init__(self) -> None:
        self.bos, self.eos, self.pad = 0, 1, 2

    def encode_batch(self, texts):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def decode(self, ids):  # type: ignore[no-untyped-def]
        return "".join(chr(i) for i in ids if i > 2)


def test_pieces_add_up() -> None:
    ids = [0, *map(ord, "a b"), 1]
    assert pieces(Letters(), ids) == ["<s>", "a", " ", "b", "</s>"]


def test_whole_words_only() -> None:
    parts = ["<s>", "The", " film", " un", "happy", ",", " end", "'", "s", " so", "</s>"]
    assert whole_words(parts) == [(1, "The"), (2, "film"), (9, "so")]


def test_what_has_no_glyph_is_left_out() -> None:
    assert drawable("a\N{CJK UNIFIED IDEOGRAPH-4E00}é\N{REPLACEMENT CHARACTER}\t", "DejaVu Sans Mono") in (
        "aé",
        "aé\ufffd",
    )
