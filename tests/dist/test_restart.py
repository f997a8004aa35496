"""A checkpoint of any layout continues in any other: the same samples, masks and, but for rounding, the same curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.launch import TINY, assert_close, pretrain, weights

EVERY = 2
ROUND_ROBIN = "round_robin.json"  # stage 2, where what a rank needs lies in another's file
# One launch after the other, of so many ranks: run -> (the run that it continues, the DeepSpeed JSON, and how many
# ranks split a layer).
Run = tuple[str, str, int]
LAUNCHES: tuple[tuple[int, dict[str, Run]], ...] = (
    (1, {"unchanged": ("", "zero1.json", 1)}),
    (
        2,
        {
            "2-offload": ("unchanged", "zero2_offload.json", 1),
            "3-offload-split": ("unchanged", "zero3_offload.json", 2),
            "round-robin": ("unchanged", ROUND_ROBIN, 1),
            "1-two": ("unchanged", "zero1.json", 1),
        },
    ),
    (
        4,
        {
            "3": ("2-offload", "zero3.json", 1),
            "2-split": ("3-offload-split", "zero2.json", 2),
        },
    ),
    (
        2,
        {
            "0-split": ("3", "zero0.json", 2),
            "1": ("2-split", "zero1.json", 1),
            "2": ("round-robin", "zero2.json", 1),
        },
    ),
    (1, {"0": ("0-split", "zero0.json", 1)}),
)
CHANGED = [name for _, runs in LAUNCHES[1:] for name in runs]
STEPS = EVERY * len(LAUNCHES) + 4


def rewound(folder: Path, source: Path, step: int) -> None:
    """A copy of a run as it was after `step`."""
    shutil.copytree(source, folder)
    (folder / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


def curve(folder: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines], dtype=torch.float64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run goes on to the end; those of a launch from two steps further than those of the one before."""
    folder = tmp_path_factory.mktemp("restart")
    mechanics = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    (folder / ROUND_ROBIN).write_text(json.dumps(mechanics))
    common = (TINY, f"train.steps={STEPS}", f"run.save_every={EVERY}", f"run.keep_last={STEPS}")
    for i, (ranks, runs) in enumerate(LAUNCHES):
        given = []
        for name, (source, file, split) in runs.items():
            if source:
                rewound(folder / name, folder / source, EVERY * i)
            path = folder / file if file == ROUND_ROBIN else Path("ds_configs") / file
            layout = (f"train.deepspeed={path}", f"train.tensor_parallel={split}")
            given.append([*common, f"run.dir={folder / name}", *layout])
        pretrain(*given, ranks=ranks)
    return folder


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_run_is_the_unchanged_one(trained: Path, name: str) -> None:
    assert (curve(trained / name) / curve(trained / "unchanged") - 1).abs().max() < 1e-5
    assert_close(weights(trained / name), weights(trained / "unchanged"))
