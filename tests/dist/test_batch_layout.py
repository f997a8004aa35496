"""The same global batch trains the same model, however ranks, micro-batches and ZeRO share it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch import TINY, assert_close, run, weights

LAYOUTS = [
    # (ranks, micro-batch, ZeRO stage)
    (1, 4, 0),
    (2, 4, 0),
    (1, 8, 1),
    (2, 4, 1),
    (1, 4, 2),
    (2, 2, 2),
]


def trained(folder: Path, ranks: int, micro: int, stage: int) -> dict[str, torch.Tensor]:
    run(
        "pretrain",
        TINY,
        f"run.dir={folder}",
        f"train.micro_batch={micro}",
        f"train.deepspeed=ds_configs/zero{stage}.json",
        ranks=ranks,
    )
    return weights(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("one") / "run", 1, 8, 0)


@pytest.mark.parametrize(("ranks", "micro", "stage"), LAYOUTS)
def test_same_weights(tmp_path: Path, reference: dict[str, torch.Tensor], ranks: int, micro: int, stage: int) -> None:
    assert_close(trained(tmp_path / "run", ranks, micro, stage), reference)
