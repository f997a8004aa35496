"""Frozen features are the model's own, probes tell what can be told and no more, and a run gets its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import probe as probes
from finetune import report as reports
from finetune.features import FrozenEncoder, extract, load_encoder
from finetune.probe import (
    PRETRAINED,
    UNTRAINED,
    ProbeTable,
    knn_accuracy,
    labelled_data,
    linear_accuracy,
    probe,
    usable,
)
from models.data2vec import Data2Vec
from pretrain import pieces
from pretrain.checkpoint import CheckpointError
from pretrain.config import Config, load
from pretrain.data.sources import open_images
from pretrain.labelled.image import PIXELS, centre_crops
from pretrain.labelled.samples import NoProbe, balanced_order
from pretrain.saved import find
from pretrain.settings import ConfigError, to_yaml

ROOT = Path(__file__).parents[2]


def tiny(**data: str) -> Config:
    return load(ROOT / "tests/tiny.yaml", [f"data.path={data.get('path', ROOT / 'data/fashion_mnist')}"])


@pytest.fixture(scope="module")
def model() -> Data2Vec:
    torch.manual_seed(3)
    model = Data2Vec(tiny().model)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def write_checkpoint(folder: Path, model: Data2Vec, config: Config, ranks: int, step: int = 7) -> Path:
    """What pretrain.checkpoint writes, teacher, student and decoder cut into `ranks` flat shards."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    whole = [(f"teacher/{name}", p) for name, p in model.teacher.named_parameters()]
    whole += [(f"master/{name}", p) for name, p in model.named_parameters() if not name.startswith("teacher.")]
    shard = -(-sum(p.numel() for _, p in whole) // ranks)
    for rank in range(ranks):
        found, begin = [], 0
        for name, parameter in whole:
            flat = parameter.detach().flatten()
            first, last = max(rank * shard - begin, 0), min((rank + 1) * shard - begin, flat.numel())
            if first < last:
                found.append(pieces.Piece(name, tuple(parameter.shape), first, flat[first:last].clone()))
            begin += flat.numel()
        pieces.write(pieces.file(path, rank), found)
    (path / "config.yaml").write_text(to_yaml(config))
    meta = {"step": step, "ranks": ranks, "zero_stage": 1, "precision": "fp32"}
    (path / "state.json").write_text(json.dumps(meta))
    (folder / "checkpoints" / "latest").write_text(path.name + "\n")
    return path


def noise_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_teacher_of_several_ranks_is_whole(tmp_path: Path, model: Data2Vec, ranks: int) -> None:
    write_checkpoint(tmp_path, model, tiny(), ranks)
    loaded = load_encoder(tmp_path).encoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.teacher.state_dict().items())


def test_missing_piece_is_named(tmp_path: Path, model: Data2Vec) -> None:
    path = write_checkpoint(tmp_path, model, tiny(), ranks=2)
    pieces.file(path, 0).unlink()
    with pytest.raises(CheckpointError, match=r"\d+ of \d+ values of |missing: .*teacher\.local") as error:
        load_encoder(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_features_are_the_models_own(tmp_path: Path, model: Data2Vec, which: str) -> None:
    path = write_checkpoint(tmp_path, model, tiny(), ranks=2)
    pixels, own = noise_images(5), getattr(model, which)
    found = load_encoder(path, which).features(pixels)
    with torch.no_grad():
        wanted = own(own.local(pixels))[:, model.config.extra_tokens :]
    assert found.positions.shape == (5, 16, 32) and found.pooled.shape == (5, 32)
    torch.testing.assert_close(found.positions, wanted)
    torch.testing.assert_close(found.pooled, wanted.mean(dim=1))


def test_any_block_can_be_asked_for(model: Data2Vec) -> None:
    frozen, pixels = FrozenEncoder(model.teacher, model.config), noise_images(2)
    with torch.no_grad():
        layers = list(model.teacher.layers(*model.teacher.context(model.teacher.local(pixels))))
    for layer, (output, _) in enumerate(layers):
        torch.testing.assert_close(frozen.features(pixels, layer).positions, output[:, 1:])
    with pytest.raises(IndexError):
        frozen.features(pixels, len(layers))


def test_untrained_is_where_the_run_began() -> None:
    config = tiny()
    state = torch.random.get_rng_state()
    untrained = FrozenEncoder.untrained(config.model, config.train.seed).encoder.state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(config.train.seed)  # as Trainer does
    start = Data2Vec(config.model).student.state_dict()
    assert all(torch.equal(untrained[name], tensor) for name, tensor in start.items())


def test_extract_keeps_the_order(model: Data2Vec) -> None:
    config = tiny()
    dataset = centre_crops(open_images(config.data.path, "test"), config)
    frozen = FrozenEncoder(model.teacher, model.config)
    ids = [9, 2, 500, 2]
    wanted = frozen(torch.stack([dataset[0, i].inputs for i in ids])).numpy()
    np.testing.assert_allclose(extract(frozen, dataset, batch_size=3, indices=ids), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_no_run_is_said_in_one_line(tmp_path: Path) -> None:
    for path, error, words in (
        (tmp_path / "nowhere", ConfigError, "is no folder"),
        (tmp_path, ConfigError, "neither a run folder nor a checkpoint"),
    ):
        with pytest.raises(error, match=words) as raised:
            find(path)
        assert "\n" not in str(raised.value)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        find(tmp_path)


def blobs(count: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 4
    return (np.eye(4, 16)[y] * 10 + spread * rng.standard_normal((count, 16)) + 3).astype(np.float32), y


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_accuracy])
def test_probes_find_what_is_there_and_nothing_else(accuracy) -> None:  # type: ignore[no-untyped-def]
    assert accuracy(*blobs(80, 1, seed=0), *blobs(400, 1, seed=1)) > 0.98
    noise = np.random.default_rng(2).standard_normal((1200, 16)).astype(np.float32)
    y = np.random.default_rng(3).integers(0, 4, 1200)
    assert 0.18 < accuracy(noise[:400], y[:400], noise[400:], y[400:]) < 0.32


def test_one_label_a_class() -> None:
    few, test = blobs(4, 0.1, seed=0), blobs(40, 0.1, seed=1)
    assert knn_accuracy(*few, *test) > 0.98
    assert linear_accuracy(*few, *test) > 0.25  # standardised by four images, noise is as large as what counts


def test_a_feature_that_was_constant_in_training_is_left_out() -> None:
    (x, y), (test_x, test_y) = blobs(80, 1, seed=0), blobs(400, 1, seed=1)
    x[:, 15], test_x[:, 15] = 0, 1e3 * test_y
    assert linear_accuracy(x, y, test_x, test_y) > 0.98


def test_subsets_are_balanced_and_nested() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 300))
    order = balanced_order(labels, seed=4)
    assert sorted(order) == list(range(3000))
    for count in (10, 100, 1000):
        assert set(np.bincount(labels[order[:count]])) == {count // 10}
    assert np.ptp(np.bincount(labels[order[:105]])) == 1
    assert not np.array_equal(order, balanced_order(labels, seed=5))


def test_small_classes_are_used_up() -> None:
    labels = np.array([0] * 3 + [1] * 97)
    assert np.bincount(labels[balanced_order(labels, 0)[:20]]).tolist() == [3, 17]


def test_counts_that_cannot_be_had_are_left_out() -> None:
    labels = np.repeat(np.arange(10), 50)
    assert usable(labels, (5, 100, 1000, "all")) == [100, "all"]
    train, test = blobs(200, 4, seed=0), blobs(200, 4, seed=1)
    found = probe(*train, *test, labels=(40, 1000, "all"))
    assert list(found["knn"]) == list(found["linear"]) == ["40", "all"]
    assert found["knn"]["40"].draws == probes.DRAWS and found["knn"]["all"].draws == 1
    assert found == probe(*train, *test, labels=(40, 1000, "all"))


def write_images(folder: Path, count: int, size: tuple[int, int] = (40, 32)) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(folder.name))
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def test_data_that_cannot_judge(tmp_path: Path) -> None:
    write_images(tmp_path / "plain", 3)
    write_images(tmp_path / "classes/a", 3)
    write_images(tmp_path / "classes/b", 3)
    for name, words in (("plain", "have no labels"), ("classes", "are training images too")):
        with pytest.raises(NoProbe, match=words):
            labelled_data(tiny(path=str(tmp_path / name)))


def test_classes_mean_the_same_in_both_splits(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "train/c", "test/b", "test/c"):
        write_images(tmp_path / name, 2)
    data = labelled_data(tiny(path=str(tmp_path)))
    assert data.test_y.tolist() == [1, 1, 2, 2] and data.classes == ["a", "b", "c"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of the real program on the shipped data."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    small = "model.width=32 model.decoder.width=32 model.depth=2 model.targets.top_k_layers=2 train.batch_size=8"
    subprocess.run(
        [sys.executable, "-m", "pretrain", "configs/pretrain/image_demo.yaml", "train.steps=4", "run.log_every=1",
         f"run.dir={folder}", *small.split()],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    return folder


def is_a_picture(path: Path) -> bool:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels.shape == (1200, 1800, 3) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_report_of_a_run(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(probes, "MOST_TRAIN", 400)
    monkeypatch.setattr(probes, "MOST_TEST", 200)
    monkeypatch.setattr(probes, "DRAWS", 2)
    monkeypatch.setattr(reports, "GALLERY", 100)
    picture = reports.report(run)
    table = ProbeTable.read(run / "probe.json")
    said = capsys.readouterr().out
    assert is_a_picture(picture) and picture == run / "report.png"
    assert list(table.rows) == [PRETRAINED, UNTRAINED, PIXELS] and table.counts == ["100", "all"]
    assert (table.step, table.train_images, table.test_images) == (4, 400, 200)
    assert str(table) in said and table.verdict in said and str(picture) in said
    monkeypatch.setattr(reports, "compare", lambda *_: pytest.fail("the probe of this step is there"))
    assert reports.probed(find(run)) == table


def test_report_without_labels_in_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "photos", 5)
    colour = ["model.image={size: 32, patch: 4, channels: 3, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}"]
    config = load(ROOT / "tests/tiny.yaml", [*colour, f"data.path={tmp_path / 'photos'}"])
    write_checkpoint(tmp_path / "run", Data2Vec(config.model), config, ranks=2)
    picture = reports.report(tmp_path / "run")
    assert is_a_picture(picture) and not (tmp_path / "run/probe.json").exists()
    assert "have no labels; the picture shows training images" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["finetune.probe", str(tmp_path / "run")])
    assert probes.main() == 2
    assert "error: no probe" in capsys.readouterr().err
