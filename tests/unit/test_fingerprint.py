"""What ranks must have in common: what a fingerprint tells apart and what not, and the sentence that names ranks."""

import io
import shutil
import tarfile

import numpy as np
import pytest
import soundfile
from PIL import Image

from pretrain import fingerprint
from pretrain.config import load
from pretrain.data.recordings import open_audio
from pretrain.data.sources import open_images
from pretrain.peers import Peers

TINY = "tests/tiny.yaml"


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def images(tmp_path):
    for i in range(6):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return tmp_path / "images"


def test_a_folder_of_images(images, tmp_path):
    expected = open_images(str(images)).fingerprint()
    shutil.copytree(images, tmp_path / "elsewhere")
    assert open_images(str(tmp_path / "elsewhere")).fingerprint() == expected
    (images / "a" / "2.png").unlink()
    assert open_images(str(images)).fingerprint() != expected


def test_tar_shards(tmp_path):
    def shard(name, sizes):
        path = tmp_path / name / "shard.tar"
        path.parent.mkdir()
        with tarfile.open(path, "w") as tar:
            for i, size in enumerate(sizes):
                member = tarfile.TarInfo(f"{i}.png")
                member.size = size
                tar.addfile(member, io.BytesIO(bytes(size)))
        return open_images(str(path)).fingerprint()

    assert shard("a", [600, 700]) == shard("b", [600, 700])
    assert shard("c", [600, 701]) != shard("d", [600, 700])


def test_idx_files(tmp_path):
    def idx(name, images):
        path = tmp_path / name
        path.write_bytes(b"\0\0\x08\x03" + np.array(images.shape, ">u4").tobytes() + images.tobytes())
        return open_images(str(path)).fingerprint()

    images = np.arange(200 * 9, dtype=np.uint32).astype(np.uint8).reshape(200, 3, 3)
    assert idx("a", images) == idx("b", images)
    assert idx("c", images[:-1]) != idx("a2", images)
    assert idx("d", images + np.uint8(1)) != idx("a3", images)


def test_recordings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def clips(name, lengths):
        (tmp_path / name).mkdir()
        for i, length in enumerate(lengths):
            soundfile.write(tmp_path / name / f"{i}.wav", np.zeros(length), 16_000)
        return open_audio(str(tmp_path / name), progress=False).fingerprint()

    assert clips("a", [500, 600]) == clips("b", [500, 600])
    assert clips("c", [500, 601]) != clips("d", [500, 600])


def test_settings_of_a_machine_may_differ_and_others_not():
    facts = fingerprint.settings(load(TINY))
    assert fingerprint.settings(load(TINY, ["data.path=/local", "data.workers=3", "train.threads=2"])) == facts
    for other in ("train.seed=2", "watch.slow_step=3", "run.dir=/elsewhere", "train.deepspeed=ds_configs/zero1.json"):
        assert fingerprint.settings(load(TINY, [other])) != facts


def test_code_and_streams():
    code = fingerprint.code()
    assert {"python", "torch", "deepspeed", "pretrain/train.py", "models/data2vec.py", "pretrain/data/text.py"} <= set(
        code
    )
    assert fingerprint.streams(1) == fingerprint.streams(1)
    assert all(fingerprint.streams(1)[name] != value for name, value in fingerprint.streams(2).items())


def test_the_sentence():
    peers = Peers()
    peers.size, peers.who = 4, [f"rank {rank} (n{rank // 2}, pid 7)" for rank in range(4)]
    usual = {"config": {"optim.lr": "1", "x": "1"}, "code": {"a.py": "1"}}
    assert fingerprint.disagreement([usual] * 4, peers) == ""
    other = {"config": {"optim.lr": "2", "x": "1"}, "code": {"a.py": "1"}}
    told = fingerprint.disagreement([other, usual, usual, usual], peers)
    assert told.startswith(
        "ranks disagree on the config: rank 0 (n0, pid 7) has optim.lr=2, not 1; compared with rank 1 ("
    )
    newer = {"config": usual["config"], "code": {"a.py": "2", "b.py": "1"}}
    told = fingerprint.disagreement([usual, usual, newer, newer], peers)
    assert "the code: rank 2 (n1, pid 7), rank 3 (n1, pid 7) has a.py=2, not 1 and b.py=1, not missing" in told
