"""A checkpoint of any layout continues in any other: the same samples, masks and, but for rounding, the same curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.launch import TINY, assert_close, run, weights

EVERY = 2
Layout = tuple[str, int, int]  # ds_configs/zero*.json, ranks, and how many of them split a layer
CHAIN: tuple[Layout, ...] = (
    ("1", 2, 1),
    ("3", 4, 1),
    ("2", 4, 2),
    ("0", 1, 1),
    ("3_offload", 2, 2),
    ("2_offload", 2, 1),
    ("0", 2, 2),
)
STEPS = EVERY * len(CHAIN) + 6


def train(folder: Path, layout: Layout, deepspeed: str = "") -> None:
    zero, ranks, tensor_parallel = layout
    deepspeed = deepspeed or f"ds_configs/zero{zero}.json"
    mechanics = [f"train.deepspeed={deepspeed}", f"train.tensor_parallel={tensor_parallel}"]
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
    train(folder, ("1", 1, 1))
    return folder


def test_a_chain_of_changes_is_the_unchanged_run(tmp_path: Path, unchanged: Path) -> None:
    """Every link goes on, from two steps further, to the end; each is compared from its change on."""
    source, expected, final = unchanged, curve(unchanged), weights(unchanged)
    for i, layout in enumerate(CHAIN):
        source = rewound(tmp_path / f"{i}", source, EVERY * (i + 1))
        train(source, layout)
        assert (curve(source) / expected - 1).abs().max() < 1e-5, layout
        assert_close(weights(source), final)


def test_the_same_stage_and_ranks_laid_out_otherwise(tmp_path: Path, unchanged: Path) -> None:
    """By other settings in the DeepSpeed JSON: what a rank needs lies in another's file."""
    mechanics = tmp_path / "round_robin.json"
    mechanics.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    first = rewound(tmp_path / "first", unchanged, EVERY)
    train(first, ("2", 2, 1), str(mechanics))
    second = rewound(tmp_path / "second", first, 2 * EVERY)
    train(second, ("2", 2, 1))
    assert (curve(second) / curve(unchanged) - 1).abs().max() < 1e-5
