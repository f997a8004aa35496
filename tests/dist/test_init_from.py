"""A start from another run's weights: exact in fp32, whatever the layout and the precision of the forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain import full
from tests.launch import TINY, pretrain, run

# The first update has rate 0, a decay of 1 leaves the teacher alone: the first checkpoint holds what was started from.
STILL = ("train.steps=1", "ema.start=1", "ema.end=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    run("pretrain", TINY, f"run.dir={folder}", "train.seed=5")
    return folder


LAYOUTS = {  # ranks -> ZeRO stage and how many of them split a layer
    1: [(1, 1)],
    2: [(2, 1), (3, 2)],
}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_weights_are_those_of_the_file(tmp_path: Path, trained: Path, ranks: int) -> None:
    full.write(full.read(trained), tmp_path / "start.safetensors")
    source = tmp_path / "start.safetensors" if ranks > 1 else trained
    given = (TINY, f"train.init_from={source}", "train.precision=bf16", *STILL)
    folders = {
        tmp_path / str(stage): (f"train.deepspeed=ds_configs/zero{stage}.json", f"train.tensor_parallel={split}")
        for stage, split in LAYOUTS[ranks]
    }
    told = pretrain(*([*given, f"run.dir={folder}", *own] for folder, own in folders.items()), ranks=ranks)
    assert told.count(f"weights: {source}, step 5") == len(folders)
    expected = full.read(trained).tensors
    for folder in folders:
        found = full.read(folder).tensors
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_what_does_not_fit_is_one_line(tmp_path: Path, trained: Path) -> None:
    for start, more, words in (
        (trained, "model.depth=3", "do not fit the model; missing: student.blocks.2."),
        (tmp_path, "train.steps=1", "neither a run folder nor a checkpoint"),
    ):
        done = run("pretrain", TINY, f"run.dir={tmp_path / 'run'}", f"train.init_from={start}", more, status=2)
        assert words in done.stderr and done.stderr.count("\n") == 1
