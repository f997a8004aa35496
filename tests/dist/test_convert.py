"""The full form of a checkpoint: the trained weights themselves, in one file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models.data2vec import Data2Vec
from pretrain import full
from pretrain.checkpoint import CheckpointError
from pretrain.config import load
from pretrain.saved import Checkpoint
from pretrain.settings import ConfigError, to_yaml
from tests.launch import run

STAGE_3 = "train.deepspeed=ds_configs/zero3.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on two ranks, which own parts of every parameter, and `parameters.pt`, what it trained."""
    folder = tmp_path_factory.mktemp("convert") / "run"
    run("tests.dist.convert_worker", str(folder), STAGE_3, ranks=2)
    return folder


def test_the_file_is_the_trained_model(tmp_path: Path, trained: Path) -> None:
    told = run("convert", str(trained), str(tmp_path / "out.safetensors")).stdout
    assert "after step 3" in told
    found, expected = load_file(tmp_path / "out.safetensors"), torch.load(trained / "parameters.pt")
    assert found.keys() == expected.keys()
    assert {name.split(".")[0] for name in found} == {"student", "decoder", "teacher"}
    for name, value in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value), name
    moved = [name for name in found if name.startswith("teacher.")]
    assert any(not torch.equal(found[name], found[name.replace("teacher", "student", 1)]) for name in moved)
    config = load("tests/tiny.yaml", [STAGE_3])
    Data2Vec(config.model).load_state_dict(found)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3", "config": to_yaml(config)}
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_bad_input_is_one_line(tmp_path: Path, trained: Path) -> None:
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    for source, target, error, words in (
        (trained, there, ConfigError, "is there already"),
        (trained, tmp_path / "out.pt", ConfigError, "NAME.safetensors"),
        (trained, tmp_path / "no" / "out.safetensors", ConfigError, "cannot write"),
        (tmp_path, tmp_path / "out.safetensors", ConfigError, "neither a run folder nor a checkpoint"),
    ):
        with pytest.raises(error, match=words) as told:
            full.write(full.read(source), target)
        assert "\n" not in str(told.value)
    done = run("convert", str(trained), str(there), status=2)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert there.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"step": null}'])
def test_a_damaged_state_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state.json is damaged: \w+") as told:
        assert Checkpoint(tmp_path).step
    assert "\n" not in str(told.value)


def test_a_missing_piece_leaves_no_file(tmp_path: Path, trained: Path) -> None:
    shard = next(trained.glob("checkpoints/*/shard_00001.safetensors"))
    aside = shard.rename(tmp_path / "aside")
    try:
        with pytest.raises(CheckpointError, match=r"values of .* are there"):
            full.write(full.read(trained), tmp_path / "out.safetensors")
    finally:
        aside.rename(shard)
    assert not list(tmp_path.glob("*safetensors*"))
