"""Which checkpoints stay, and what of the metrics a resumed run keeps."""

import json
from pathlib import Path

import pytest

from pretrain.checkpoint import CheckpointError, differences, latest, prune
from pretrain.config import RunConfig, load
from pretrain.metrics import _reopen
from pretrain.saved import find


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


def test_the_best_is_asked_for_or_the_newest(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (3, 6):
        (checkpoints / f"step_{step:08d}").mkdir(parents=True)
        (checkpoints / f"step_{step:08d}" / "state.json").write_text(json.dumps({"step": step}))
        (checkpoints / f"step_{step:08d}" / "config.yaml").touch()
    (checkpoints / "latest").write_text("step_00000006\n")
    assert find(tmp_path).step == find(tmp_path, best=True).step == 6  # no evaluation has chosen one
    (checkpoints / "best").write_text("step_00000003\n")
    assert find(tmp_path).step == 6 and find(tmp_path, best=True).step == find(checkpoints, best=True).step == 3
    assert find(checkpoints / "step_00000006", best=True).step == 6


def test_a_best_that_was_of_a_future_given_up_is_an_error(folder):
    """`latest` was set back by hand, and what came after it is gone with the next checkpoint."""
    (folder / "best").write_text("step_00000007\n")
    prune(folder, "step_00000004", RunConfig(keep_last=2))
    with pytest.raises(CheckpointError) as told:
        latest(folder, "best")
    assert str(told.value) == (
        f"{folder}/best names step_00000007, which is not there; these are: step_00000003, step_00000004; write one of "
        "them into it"
    )


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
