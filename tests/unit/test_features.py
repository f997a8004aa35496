"""Features without training: of any block, of samples in memory, and stored: what is read back is what was computed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from PIL import Image

from finetune import features as program
from finetune import probe as probes
from finetune.features import FrozenEncoder, load_encoder, store
from finetune.stored import Store, load
from models.config import RATE, HeadConfig
from models.data2vec import Data2Vec
from models.heads import FineTuned
from pretrain import full
from pretrain.config import Config
from pretrain.data.sources import DataError, open_images
from pretrain.data.tokenizer import open_tokenizer, train_tokenizer
from pretrain.full import Full
from pretrain.labelled.image import centre_crops
from pretrain.settings import ConfigError, to_tree
from tests.unit.test_probe import noise_images, tiny
from tests.unit.test_speech_text_probes import audio_config, model_of, sentence, text_config, write_tones

WORDS = ["lovely", "dreadful", "tedious", "warm"]


def full_of(config: Config, assets: dict[str, bytes] | None = None, step: int = 7) -> Full:
    return Full(dict(model_of(config).state_dict()), to_tree(config), step, assets or {})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Full]:
    """A model of 28 x 28 images in a file."""
    form = full_of(tiny())
    path = tmp_path_factory.mktemp("images") / "model.safetensors"
    full.write(form, path)
    return path, form


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Full]:
    folder = tmp_path_factory.mktemp("speech")
    write_tones(folder / "tones")
    # One layer of positions: behind more of them, frames at a padded clip's end are not what they are in it alone.
    form = full_of(audio_config(folder / "tones", "model.audio.position_layers=1"))
    full.write(form, folder / "model.safetensors")
    return folder, form


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Full]:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(2)
    lines = [sentence(rng, WORDS) for _ in range(300)]
    (folder / "plain.txt").write_text("\n".join(lines))
    train_tokenizer([folder / "plain.txt"], folder / "t.model", vocabulary=330)
    form = full_of(text_config(folder), {"t.model": (folder / "t.model").read_bytes()})
    full.write(form, folder / "model.safetensors")
    (folder / "t.model").rename(folder / "elsewhere.model")  # the file has its own
    return folder, form


def by_hand(form: Full, inputs: torch.Tensor) -> list[torch.Tensor]:
    """(B, T, D) after each of the teacher's blocks, of samples that are not padded."""
    model = form.network()
    assert isinstance(model, Data2Vec)
    model.load_state_dict(form.tensors)
    with torch.no_grad():
        local = (model.student if model.teacher.local is None else model.teacher).eval().local(inputs)
        x, bias = model.teacher.context(local)
        return [output[:, form.model.extra_tokens :] for output, _ in model.teacher.layers(x, bias)]


def same(ours: object, expected: object, bound: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), rtol=bound, atol=bound)


def test_several_blocks_at_once(images: tuple[Path, Full]) -> None:
    path, form = images
    encoder, pixels = load_encoder(path), noise_images(3)
    blocks = by_hand(form, pixels)
    found = encoder.features(pixels, [-1, 0, -1])
    assert [part.lengths for part in found] == [None] * 3
    for part, wanted in zip(found, (blocks[1], blocks[0], blocks[1]), strict=True):
        same(part.positions, wanted)
        same(part.pooled, wanted.mean(dim=1))
    every = encoder.features(pixels, "all")
    assert len(every) == 2 and all(torch.equal(a.pooled, b.pooled) for a, b in zip(every, found[1:], strict=True))
    with pytest.raises(IndexError):
        encoder.features(pixels, [0, 2])


def test_images_in_memory_are_cropped_as_files_are(tmp_path: Path, images: tuple[Path, Full]) -> None:
    path, _ = images
    encoder, pixels = load_encoder(path), noise_images(3)
    arrays = [image[0].numpy() for image in pixels]
    assert torch.equal(encoder.features(arrays).positions, encoder.features(pixels).positions)
    (tmp_path / "files").mkdir()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (h, 40, 3), dtype=np.uint8)) for h in (30, 90)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "files" / f"{i}.png")
    crops = centre_crops(open_images(str(tmp_path / "files")), tiny())
    wanted = encoder.features(torch.stack([crops[0, i].inputs for i in range(2)])).positions
    opened = [pictures[0], Image.open(tmp_path / "files/1.png")]
    for _ in range(2):  # what is read once can be read again
        assert torch.equal(encoder.features(opened).positions, wanted)
    for bad, words in (
        ([pixels[0].float().numpy()], r"image 0 is float32 of shape \(1, 28, 28\): give PIL images"),
        ([], r"samples should be a list of one or more, not \[\]"),
        ("a picture", "not 'a picture'"),
    ):
        with pytest.raises(DataError, match=words):
            encoder.features(bad)


def test_waveforms_in_memory_are_normalised_and_alone(speech: tuple[Path, Full]) -> None:
    folder, form = speech
    encoder, rng = load_encoder(folder / "model.safetensors"), np.random.default_rng(0)
    waves = [(3 + 5 * rng.standard_normal(n)).astype(np.float32) for n in (9000, 20_000, 14_321, 50_000)]
    found = encoder.features([waves[0], torch.from_numpy(waves[1]), waves[2].astype(np.float64), waves[3]], layer=1)
    assert found.lengths is not None
    for i, wave in enumerate(waves):
        heard = wave[: 2 * RATE].astype(np.float64)  # model.audio.seconds
        normal = (heard - heard.mean()) / np.sqrt(heard.var() + 1e-5)
        alone = by_hand(form, torch.from_numpy(normal.astype(np.float32))[None])[1][0]
        assert len(alone) == found.lengths[i]
        same(found.positions[i, : len(alone)], alone, 1e-3)
        same(found.pooled[i], alone.mean(dim=0), 1e-3)
    for bad, words in (
        ([waves[0], waves[1][:100]], r"waveform 1 is float32 of shape \(100,\)"),
        ([np.zeros((2, 9000), np.float32)], r"waveform 0 is .*\(2, 9000\)"),
        ([np.zeros(9000, np.int16)], "int16"),
        ([waves[0], np.zeros(9000, np.float32)], "waveform 1: silent"),
    ):
        with pytest.raises(DataError, match=words):
            encoder.features(bad)


def test_texts_in_memory_with_the_tokenizer_that_travels(text: tuple[Path, Full]) -> None:
    folder, form = text
    texts = ["the film was lovely", "a dreadful story of its time and place", "warm"]
    found = load_encoder(folder / "model.safetensors").features(texts)
    tokenizer = open_tokenizer(folder / "elsewhere.model")
    for i, ids in enumerate(tokenizer.encode_batch(texts)):
        alone = by_hand(form, torch.tensor([[tokenizer.bos, *ids, tokenizer.eos]]))[-1][0]
        same(found.positions[i, : len(alone)], alone)
        same(found.pooled[i], alone.mean(dim=0))
    with pytest.raises(DataError, match="text 1 is a int: give strings"):
        load_encoder(folder / "model.safetensors").features(["a", 3])
    full.write(replace(form, assets={}), folder / "bare.safetensors")
    with pytest.raises(DataError, match="no tokenizer came with the weights"):
        load_encoder(folder / "bare.safetensors").features(texts)


def test_student_of_a_fine_tuned_model(tmp_path: Path) -> None:
    config = tiny()
    torch.manual_seed(0)
    network = FineTuned(config.model, HeadConfig(outputs=3)).eval()
    tree = to_tree(config) | {"head": {"outputs": 3}, "task": "image"}
    full.write(Full(dict(network.state_dict()), tree), tmp_path / "tuned.safetensors")
    pixels = noise_images(2)
    found = load_encoder(tmp_path / "tuned.safetensors", which="student").features(pixels)
    with torch.no_grad():
        same(network.head(found.positions.clone()), network(pixels))
    with pytest.raises(ConfigError, match="no teacher; take the student"):
        load_encoder(tmp_path / "tuned.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of grey images, 7 and 6, one of which is no image."""
    folder = tmp_path_factory.mktemp("folders")
    rng = np.random.default_rng(5)
    for name, count in (("cat", 7), ("dog", 6)):
        (folder / name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / name / f"{i}.png")
    (folder / "cat" / "3.png").write_bytes(b"no image")
    return folder


GENUINE = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("kind", ["safetensors", "npz", "parquet"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stored_images(
    tmp_path: Path, images: tuple[Path, Full], folders: Path, kind: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, form = images
    files = sorted(folders.glob("*/*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(files[i])))[None] for i in GENUINE])
    blocks, bound = by_hand(form, pixels), {"float32": 1e-5, "float16": 2e-3}[dtype]
    shared = {"layers": (-1, 0), "kind": kind, "dtype": dtype, "shard": 5, "batch_size": 2, "workers": 0}
    store(path, str(folders), tmp_path / "pooled", **shared)
    assert "pooled features of 12 images; left out 1: " + str(files[3]) in capsys.readouterr().out
    index, arrays = load(tmp_path / "pooled")
    assert sorted(arrays) == ["labels", "pooled.0", "pooled.1", "samples"]
    assert len(list((tmp_path / "pooled").glob(f"features-0000[012].{kind}"))) == 3
    assert arrays["samples"].tolist() == GENUINE and index.names == [str(files[i]) for i in GENUINE]
    assert arrays["labels"].tolist() == index.labels == [0] * 6 + [1] * 6 and index.classes == ["cat", "dog"]
    assert list(index.shards[0].left_out) == ["3"] and "not an image" in index.shards[0].left_out["3"]
    for block in (0, 1):
        assert arrays[f"pooled.{block}"].dtype == dtype
        same(arrays[f"pooled.{block}"], blocks[block].mean(dim=1), bound)
    store(path, str(folders), tmp_path / "positions", "positions", **shared)
    _, arrays = load(tmp_path / "positions")
    assert arrays["offsets"].tolist() == list(range(0, 12 * 16 + 1, 16))
    same(arrays["positions.1"], blocks[1].flatten(0, 1), bound)
    if kind == "parquet":  # as others read it: a row a sample
        rows = pyarrow.parquet.read_table(tmp_path / "positions/features-00001.parquet").to_pylist()
        assert [row["samples"] for row in rows] == [5, 6, 7, 8, 9]
        same(rows[2]["positions.0"], blocks[0][6], bound)


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_stored_positions_of_clips_are_ragged(tmp_path: Path, speech: tuple[Path, Full], kind: str) -> None:
    folder, form = speech
    data, out = folder / "tones", tmp_path / f"clips.{kind}"
    index = store(folder / "model.safetensors", str(data), out, "positions", ["all"], batch_size=4, workers=0)
    assert out.is_file() and (tmp_path / "clips.json").is_file() and index.classes == ["high", "low"]
    _, arrays = load(out)
    for i, name in enumerate(index.names):
        wave = soundfile.read(name)[0]
        normal = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-5)
        alone = by_hand(form, torch.from_numpy(normal.astype(np.float32))[None])
        part = slice(*arrays["offsets"][i : i + 2])
        for block in range(form.model.depth):
            same(arrays[f"positions.{block}"][part], alone[block][0], 1e-3)
    assert len(index.names) == 10 and arrays["offsets"][-1] == len(arrays["positions.0"])


def test_recordings_that_cannot_be_used_are_named(tmp_path: Path, speech: tuple[Path, Full]) -> None:
    folder, _ = speech
    rng = np.random.default_rng(0)
    for name, count in (("a", 9000), ("b", 200), ("c", 9000)):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * rng.standard_normal(count), RATE)
    (tmp_path / "d.wav").write_bytes(b"RIFF, but no more")
    index = store(folder / "model.safetensors", str(tmp_path), tmp_path / "out", "probe", workers=0)
    assert [Path(name).name for name in index.names] == ["a.wav", "c.wav"] and index.labels is None
    assert [Path(told.split(":")[0]).name for told in index.left_out] == ["d.wav", "b.wav"]
    _, arrays = load(tmp_path / "out")
    encoder = load_encoder(folder / "model.safetensors")
    waves = [soundfile.read(tmp_path / f"{name}.wav", dtype="float32")[0] for name in "ac"]
    same(arrays["probe"], encoder(torch.nn.functional.layer_norm(torch.from_numpy(np.stack(waves)), (9000,))))


@pytest.mark.parametrize("form", ["lines", "table", "folder"])
def test_stored_text(tmp_path: Path, text: tuple[Path, Full], form: str) -> None:
    folder, _ = text
    texts = ["the film was lovely", "dreadful", "a warm story of its time and place"]
    data, split, names = tmp_path / "some.txt", "train", ["some.txt line 1", "some.txt line 3", "some.txt line 4"]
    if form == "lines":
        data.write_text(f"{texts[0]}\n\n{texts[1]}\n{texts[2]}")
    else:
        for name in ("train", "test"):
            lines = [f"{label}\t{line}\n" for label, line in zip("yny", texts, strict=True)]
            (tmp_path / f"{name}.tsv").write_text("".join(lines if name == "test" else lines[:2]))
        data, split = (tmp_path, "test") if form == "folder" else (tmp_path / "test.tsv", "train")
        names = [f"test.tsv line {number}" for number in (1, 2, 3)]
    index = store(folder / "model.safetensors", str(data), tmp_path / "out", split=split, workers=0)
    assert index.names == [str(tmp_path / name) for name in names]
    assert index.labels == (None if form == "lines" else [1, 0, 1])
    assert [told.split(" (")[0] for told in index.left_out] == (["1 empty documents"] if form == "lines" else [])
    same(load(tmp_path / "out")[1]["pooled.1"], load_encoder(folder / "model.safetensors").features(texts).pooled)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_killed_extraction_goes_on(
    tmp_path: Path, images: tuple[Path, Full], folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = images

    def run(name: str) -> None:
        store(path, str(folders), tmp_path / name, shard=4, batch_size=3, workers=0)

    run("whole")
    add, written = Store.add, []

    def stop_after_two(self: Store, shard, arrays) -> None:  # type: ignore[no-untyped-def]
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.file)
        add(self, shard, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    assert not json.loads((tmp_path / "killed/index.json").read_text())["complete"]
    with pytest.raises(DataError, match="is not complete: run the same"):
        load(tmp_path / "killed")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("features-*")}
    assert (
        [file.name for file in sorted(before)]
        == written
        == ["features-00000.safetensors", "features-00001.safetensors"]
    )
    seen = []
    whole = FrozenEncoder.features

    def counted(self, inputs, *more):  # type: ignore[no-untyped-def]
        seen.append(len(inputs))
        return whole(self, inputs, *more)

    monkeypatch.setattr(FrozenEncoder, "features", counted)
    run("killed")
    assert sum(seen) == 13 - 8 and before == {file: file.stat().st_mtime_ns for file in before}
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    run("killed")
    index = json.loads((tmp_path / "killed/index.json").read_text())
    (tmp_path / "killed/index.json").write_text(json.dumps(index | {"complete": False, "names": [], "labels": None}))
    run("killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sum(seen) == 13 - 8  # nothing was left to compute
    (tmp_path / "killed/features-00001.safetensors").unlink()
    run("killed")
    assert sum(seen) == 13 - 4 and contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_folder_is_of_one_model_and_setting(
    tmp_path: Path, images: tuple[Path, Full], folders: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    path, form = images
    out = tmp_path / "out"
    store(path, str(folders), out, workers=0)
    kept = contents(out)
    with torch.no_grad():
        tensors = form.tensors | {"teacher.blocks.1.norm2.bias": form.tensors["teacher.blocks.1.norm2.bias"] + 1e-3}
    full.write(replace(form, tensors=tensors), tmp_path / "other.safetensors")
    for model, data, more, words in (
        (tmp_path / "other.safetensors", folders, [], "weights: "),
        (path, folders / "cat", [], "data: "),
        (path, folders, ["--layers", "0"], r"blocks: [1] -> [0]"),
        (path, folders, ["--dtype", "float16"], "dtype: float32 -> float16"),
        (path, folders, ["--what", "probe"], "what: pooled -> probe; blocks: [1] -> []"),
        (path, folders, ["--what", "probe", "--layers", "0"], "--layers is not for --what probe"),
        (path, folders, ["--layers", "2"], "the main blocks are 0 to 1"),
        (path, folders, ["--format", "npz", "--out", str(tmp_path / "x.parquet")], "is no name for --format npz"),
        (path, tmp_path / "nowhere", [], "does not exist"),
    ):
        line = ["features", str(model), str(data), "--out", str(out), "--workers", "0", *more]
        monkeypatch.setattr(sys, "argv", line)
        assert program.main() == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and words in told and told.count("\n") == 1
    assert contents(out) == kept


def test_probes_of_a_full_form_are_on_stored_features(
    images: tuple[Path, Full], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = images
    monkeypatch.setattr(sys, "argv", ["probe", str(path)])
    assert probes.main() == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {path} is no run") and told.count("\n") == 1
    assert f"python -m finetune.features {path} DATA --what probe" in told and "--features TRAIN TEST" in told


def test_probes_on_stored_features(
    tmp_path: Path, images: tuple[Path, Full], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes that differ in brightness, which any features tell; one of them is not among the test images."""
    path, _ = images
    rng = np.random.default_rng(0)
    for split, count, names in (("train", 20, ("dark", "grey", "light")), ("test", 8, ("dark", "light"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 30, (28, 28)) + {"dark": 0, "grey": 100, "light": 200}[name]
                Image.fromarray(noise.astype(np.uint8)).save(tmp_path / split / name / f"{i}.png")
    for split in ("train", "test"):
        store(path, str(tmp_path), tmp_path / f"to_{split}", layers=["all"], split=split, workers=0)
    store(path, str(tmp_path), tmp_path / "other", split="test", workers=0)
    monkeypatch.setattr(
        sys, "argv", ["probe", "--features", str(tmp_path / "to_train"), str(tmp_path / "to_test"), "--labels", "all"]
    )
    assert probes.main() == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line[:6] == "pooled"}
    assert rows == {"pooled.0": ["100.0", "100.0"], "pooled.1": ["100.0", "100.0"]}
    for train, test, words in (
        ("to_train", "other", "differ in blocks"),
        ("to_train", "to_train", "60 of 60 test images .* are training images too"),
    ):
        with pytest.raises((ConfigError, DataError), match=words):
            probes.compare_stored(tmp_path / train, tmp_path / test)
