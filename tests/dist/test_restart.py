"""A checkpoint of any layout continues in any other: the same samples, masks and, but for rounding, the same curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.launch import TINY, assert_close, run, weights

STEPS, EVERY = 24, 2
Layout = tuple[int, int, int]  # ZeRO stage, ranks, and how many of them split a layer
CHAIN: tuple[Layout, ...] = ((1, 2, 1), (3, 4, 1), (2, 4, 2), (0, 1, 1), (3, 2, 2), (0, 2, 1), (0, 2, 2))


def train(folder: Path, layout: Layout) -> None:
    stage, ranks, tensor_parallel = layout
    mechanics = [f"train.deepspeed=ds_configs/zero{stage}.json", f"train.tensor_parallel={tensor_parallel}"]
    every = [f"run.save_every={EVERY}", f"run.keep_last={STEPS}"]
    run("pretrain", TINY, f"run.dir={folder}", f"train.steps={STEPS}", *mechanics, *every, ranks=ranks)


def rewound(folder: Path, source: Path, step: int) -> Path:
    """A copy of a run as it was after `step`."""
    shutil.copytree(source, folder)
    (folder / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
    return folder


def curve(folder: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines], dtype=torch.float64)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unchanged") / "run"
    train(folder, (1, 1, 1))
    return folder


def test_a_chain_of_changes_is_the_unchanged_run(tmp_path: Path, unchanged: Path) -> None:
    """Every link goes on, from two steps further, to the end; each is compared from its change on."""
    source, expected, final = unchanged, curve(unchanged), weights(unchanged)
    for i, layout in enumerate(CHAIN):
        source = rewound(tmp_path / f"{i}", source, EVERY * (i + 1))
        train(source, layout)
        assert (curve(source) / expected - 1).abs().max() < 1e-5, layout
        assert_close(weights(source), final)
