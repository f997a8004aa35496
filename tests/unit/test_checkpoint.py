"""Which checkpoints stay, and what of the metrics a resumed run keeps."""

import json
from pathlib import Path

import pytest

from pretrain.checkpoint import CheckpointError, differences, latest, prune
from pretrain.config import RunConfig, load
from pretrain.metrics import _reopen


@pytest.fixture
def folder(tmp_path):
    for step in range(1, 9):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / "state.json").write_text("{}")
    (tmp_path / ".partial-step_00000009").mkdir()
    return tmp_path


def steps(folder):
    return [int(path.name[5:]) for path in sorted(folder.glob("step_*"))]


def test_keep_last_and_every(folder):
    prune(folder, "step_00000008", RunConfig(keep_last=2, keep_every=3))
    assert steps(folder) == [3, 6, 7, 8]
    assert not list(folder.glob(".partial-*"))


def test_what_lies_after_the_newest_goes_and_the_newest_stays(folder):
    prune(folder, "step_00000004", RunConfig(keep_last=1))
    assert steps(folder) == [4]


def test_a_pointer_to_nothing_is_an_error(folder):
    assert latest(folder) is None
    (folder / "latest").write_text("step_00000004\n")
    assert latest(folder) == folder / "step_00000004"
    (folder / "latest").write_text("step_00000099\n")
    with pytest.raises(CheckpointError, match="step_00000099, which is not there; these are: step_00000001"):
        latest(folder)


@pytest.mark.parametrize("torn", [b"", b'{"step": 4, "lo', b'{"step": 4}', b"\xff\xfe\n"])
def test_metrics_after_the_checkpoint_are_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in (1, 2, 3)]
    path.write_bytes(b"".join(lines) + torn)
    _reopen(path, step=2).close()
    assert path.read_bytes() == b"".join(lines[:2])
    path.write_bytes(b"".join(lines) + torn)
    _reopen(path, step=9).close()
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(("preset", "free"), [("image_base", True), ("text_base", True), ("audio_base", False)])
def test_of_speech_the_micro_batch_belongs_to_the_experiment(preset, free):
    """It decides which clips meet, and with that where the stream is."""
    path = Path(__file__).parents[2] / f"configs/pretrain/{preset}.yaml"
    old = load(path, ["train.micro_batch=1000000"] if not free else ["train.micro_batch=8"])
    new = load(path, ["train.micro_batch=500000"] if not free else ["train.micro_batch=4"])
    assert [text.split(":")[0] for text in differences(old, new)] == ([] if free else ["train.micro_batch"])
