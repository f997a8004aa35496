"""Probes while training: what others compute of the same features, within their share of the time, and without a trace
in the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

from finetune.features import FrozenEncoder, extract, load_encoder
from models.data2vec import Data2Vec
from pretrain import probe as probes
from pretrain.config import BatchPlan, Config, ProbeConfig
from pretrain.data.corpus import main as make_corpus
from pretrain.data.tokenizer import train_tokenizer
from pretrain.labelled.modality import MODALITIES
from pretrain.labelled.samples import spread
from pretrain.parallel import World
from pretrain.probe import RIDGE, Probe, by_neighbours, by_ridge
from pretrain.settings import ConfigError
from tests.launch import TINY, pretrain
from tests.launch import weights as all_weights
from tests.unit.test_probe import tiny
from tests.unit.test_speech_text_probes import audio_config, model_of, text_config, write_sentences, write_tones

WORLD = World(0, 1, torch.device("cpu"))


class Plain:
    """An engine's manners around a model."""

    def __init__(self, model: Data2Vec) -> None:
        self.module = model
        self.eval, self.train = model.eval, model.train

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)


def probe_of(config: Config, model: Data2Vec, note: Callable[[str], None] = print, **settings: Any) -> Probe:
    settings = {"every": 10, "share": 1.0, "samples": 300, "test": 100} | settings
    plan = BatchPlan(1, config.train.micro_batch or 8, 1)
    return Probe(replace(config, probe=ProbeConfig(**settings)), Plain(model), plan, WORLD, note)


def told_right(
    encoder: FrozenEncoder, config: Config, path: str, samples: int, test: int, run: Path | None = None
) -> dict[str, float]:
    """The figures by scikit-learn, of features extracted from single samples."""
    data = MODALITIES[config.model.modality].labelled(config, path, run)
    chosen, held = spread(data.train_y, samples), spread(data.test_y, test)
    x, test_x = extract(encoder, data.train, 1, indices=chosen), extract(encoder, data.test, 1, indices=held)
    y, test_y = data.train_y[chosen], data.test_y[held]
    return {
        "probe/knn": float((neighbours_of(x, y, test_x) == test_y).mean()),
        "probe/linear": float((ridge_of(x, y, test_x) == test_y).mean()),
    }


def neighbours_of(x: np.ndarray, y: np.ndarray, test: np.ndarray, most: int = 10) -> np.ndarray:
    k = min(most, np.bincount(y)[np.unique(y)].min())
    found = KNeighborsClassifier(k, weights="distance", algorithm="brute")
    return found.fit(normalize(x - x.mean(axis=0)), y).predict(normalize(test - x.mean(axis=0)))


def ridge_of(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    scaler = StandardScaler().fit(x.astype(np.float64))
    scaled = scaler.transform(x) * np.sqrt((len(x) - 1) / len(x))  # torch's deviation is the unbiased one
    alpha = RIDGE * (scaled**2).sum() / min(scaled.shape)
    found = Ridge(alpha).fit(scaled, np.eye(y.max() + 1)[y])
    return found.predict(scaler.transform(test) * np.sqrt((len(x) - 1) / len(x))).argmax(axis=1)


@pytest.mark.parametrize(("samples", "width"), [(400, 24), (60, 100)])
def test_classifiers_are_those_of_scikit_learn(samples: int, width: int) -> None:
    rng = np.random.default_rng(0)
    y, test_y = rng.integers(0, 5, samples), rng.integers(0, 5, 500)
    means = rng.standard_normal((5, width)) + 4
    x, test = (means[of] + 2 * rng.standard_normal((len(of), width)) for of in (y, test_y))
    tensors = [torch.from_numpy(a) for a in (x.astype(np.float32), y, test.astype(np.float32))]
    assert np.array_equal(by_ridge(*tensors), ridge_of(x, y, test))
    for most in (1, 10, 1000):
        expected = neighbours_of(x, y, test, most)
        assert np.array_equal(by_neighbours(*tensors, most), expected)
    assert 0.5 < (expected == test_y).mean() < 1 and (ridge_of(x, y, test) == test_y).mean() < 1


def test_a_constant_feature_is_left_out() -> None:
    x, y = torch.eye(2).repeat(20, 1) + 0.1 * torch.randn(40, 2), torch.arange(40) % 2
    constant = torch.ones(40, 1)
    test = torch.cat([x, 1e4 * (1 - y[:, None].float())], dim=1)
    assert (by_ridge(torch.cat([x, constant], dim=1), y, test) == y).all()


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sentences(tmp_path_factory.mktemp("language") / "labelled").parent
    lines = [line.split("\t")[1] for line in (folder / "labelled/train.tsv").read_text().splitlines()]
    (folder / "plain.txt").write_text("\n".join(9 * lines))
    train_tokenizer([folder / "plain.txt"], folder / "t.model", vocabulary=330)
    make_corpus([str(folder / "plain.txt"), "--tokenizer", str(folder / "t.model"), "--out", str(folder / "corpus")])
    return folder


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_figures_are_those_of_the_teachers_features(
    modality: str, tmp_path: Path, language: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(language / "labelled")
    if modality == "image":
        config, path = tiny(), tiny().data.path
    elif modality == "audio":  # one layer of positions: behind more of them, padding shows
        path = str(write_tones(tmp_path / "tones"))
        config = audio_config(tmp_path / "tones", "model.audio.position_layers=1", "train.micro_batch=32000")
    else:
        config = text_config(language / "corpus")
    model = model_of(config).train()
    encoder = FrozenEncoder(model_of(config).teacher, config.model)
    if encoder.encoder.local is None:
        encoder.encoder.local = model_of(config).student.local
    expected = told_right(encoder, config, path, 300, 100)
    found = probe_of(config, model, path=path)
    assert found(10) == expected and model.training and not model.teacher.training
    reads: list[Any] = []
    for dataset in (found.data.train, found.data.test):
        whole = type(dataset).__getitem__
        monkeypatch.setattr(
            type(dataset), "__getitem__", lambda self, key, whole=whole: reads.append(key) or whole(self, key)
        )
    assert found(20) == expected and not reads  # kept
    monkeypatch.setattr(probes, "KEPT", 0)
    found = probe_of(config, model, path=path)
    assert found(10) == found(20) == expected and len(reads) >= 2 * len(found._chosen["train"])
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.normal_()
    assert found(30) != expected or modality == "audio"  # tones are told whatever the weights


def test_images_that_cannot_be_read_are_no_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for number, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 60, (28, 28), dtype=np.uint8) + 180 * number
                Image.fromarray(noise.astype(np.uint8)).save(tmp_path / split / name / f"{i}.png")
    for file in ("train/a/3.png", "test/b/0.png", "test/b/5.png"):
        (tmp_path / file).write_bytes(b"no image")
    config = tiny(path=str(tmp_path))
    found = probe_of(config, model_of(config))
    for split, dataset, labels, left in (
        ("train", found.data.train, found.data.train_y, [11, 12]),
        ("test", found.data.test, found.data.test_y, [6, 4]),
    ):
        x, y = found._features(split, dataset, labels)
        assert torch.bincount(y).tolist() == left and len(x) == sum(left)
    assert found(1) == {"probe/knn": 1.0, "probe/linear": 1.0}


@pytest.mark.parametrize("path", ["plain", "nowhere"])
def test_data_that_cannot_judge_are_refused_in_one_line(tmp_path: Path, path: str) -> None:
    (tmp_path / "plain").mkdir()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "plain/0.png")
    config = tiny(path=str(tmp_path / path))
    with pytest.raises(ConfigError, match=r"probe.every=10: .*; or set probe.every=0") as raised:
        probe_of(config, model_of(config))
    assert "\n" not in str(raised.value)


def test_probes_keep_to_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of 5 s, every 10 s, at a share of 10 %: the second waits until the first and it are a tenth."""
    config, now, notes = tiny(), [100.0], []
    monkeypatch.setattr(probes.time, "monotonic", lambda: now[0])
    found = probe_of(config, model_of(config), notes.append, share=0.1)
    monkeypatch.setattr(
        Probe, "_features", lambda *_: (now.__setitem__(0, now[0] + 2.5), (torch.eye(4), torch.arange(4)))[1]
    )
    done = []
    for step in range(1, 301):
        now[0] += 1
        assert step % 10 == 0 or not found.due(step)
        if step % 10 == 0 and found.due(step):
            found(step)
            done.append(step)
            assert step == 10 or found._spent <= 0.1 * (now[0] - 100)
    assert done[:3] == [10, 90, 140]  # (5 + 5) of 90 + 5 + 5, then 15 of 140 + 10 + 5
    assert len(notes) == 30 - len(done)
    assert notes[0] == (
        "step 20: no probe; it would take 5.0 s, the 1 so far have taken 20.0 % of the time, and probe.share=0.1"
    )


PROBED = ("probe.every=2", "probe.share=1", "probe.samples=200", "probe.test=100")


def test_training_is_the_same_with_probes_and_without(tmp_path: Path) -> None:
    runs = {"without": (), "with": PROBED}
    pretrain(*([TINY, f"run.dir={tmp_path / name}", "train.steps=4", *more] for name, more in runs.items()))
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("without", "with")]
    assert metrics[0] == metrics[1]
    before, after = all_weights(tmp_path / "without"), all_weights(tmp_path / "with")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    found = [json.loads(line) for line in (tmp_path / "with/eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [2, 4]
    expected = told_right(load_encoder(tmp_path / "with"), tiny(), tiny().data.path, 200, 100)
    assert found[1] == {"step": 4} | expected
    assert not (tmp_path / "without/eval.jsonl").read_bytes()
    assert "probe/linear" in (tmp_path / "with/log.txt").read_text()
