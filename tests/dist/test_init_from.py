"""A start from another run's weights: exact in fp32, whatever the layout and the precision of the forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain import full
from tests.launch import TINY, run

# The first update has rate 0, a decay of 1 leaves the teacher alone: the first checkpoint holds what was started from.
STILL = ("train.steps=1", "ema.start=1", "ema.end=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    run("pretrain", TINY, f"run.dir={folder}", "train.seed=5")
    return folder


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, ("train.precision=bf16", "train.deepspeed=ds_configs/zero1.json")),
        (2, ("train.precision=bf16", "train.deepspeed=ds_configs/zero2.json")),
        (2, ("train.precision=bf16", "train.deepspeed=ds_configs/zero3.json", "train.tensor_parallel=2")),
    ],
)
def test_weights_are_those_of_the_file(tmp_path: Path, trained: Path, ranks: int, settings: tuple[str, ...]) -> None:
    full.write(full.read(trained), tmp_path / "start.safetensors")
    source = tmp_path / "start.safetensors" if ranks > 1 else trained
    started = tmp_path / "run"
    told = run("pretrain", TINY, f"run.dir={started}", f"train.init_from={source}", *STILL, *settings, ranks=ranks)
    assert f"weights: {source}, step 5" in told.stdout
    expected, found = full.read(trained).tensors, full.read(started).tensors
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
