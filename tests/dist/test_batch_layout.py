"""The same global batch trains the same model, however ranks, micro-batches and ZeRO share it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch import TINY, run, weights

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
    ours = trained(tmp_path / "run", ranks, micro, stage)
    names = [name for name in reference if not name.startswith("optimizer.")]
    assert len(names) > 80
    for name in names:
        value, expected = ours[name].float().view(-1), reference[name].float().view(-1)
        if name.endswith("attn.qkv.bias"):  # the key third's gradient is rounding noise
            third = len(value) // 3
            value, expected = (
                value[[*range(third), *range(2 * third, 3 * third)]],
                expected[[*range(third), *range(2 * third, 3 * third)]],
            )
        assert (value - expected).abs().max() <= 1e-5, name
