"""FusedAdam of apex and DeepSpeed under the engine, by twins of their kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.dist.fused_adam_worker import CONTINUED, STAGES
from tests.launch import assert_close, run, weights

BOTH = pytest.mark.parametrize("adam", ["apex", "deepspeed"])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of what was trained, and what was said."""
    folder = tmp_path_factory.mktemp("adams")
    return folder, run("tests.dist.fused_adam_worker", str(folder)).stdout.splitlines()


@BOTH
@pytest.mark.parametrize("stage", STAGES)
def test_it_trains_as_torchs(stage: int, adam: str, told: tuple[Path, list[str]]) -> None:
    assert_close(weights(told[0] / f"{stage}-{adam}"), weights(told[0] / f"{stage}-torch"))


@BOTH
@pytest.mark.parametrize("stage", CONTINUED)
def test_it_continues_exactly(stage: int, adam: str, told: tuple[Path, list[str]]) -> None:
    whole, continued = (weights(told[0] / f"{stage}-{adam}{which}") for which in ("", "-continued"))
    assert continued.keys() == whole.keys() and any("exp_avg_sq" in name for name in whole)
    for name, expected in whole.items():
        assert torch.equal(continued[name], expected), name


def test_the_host_waits_once_a_step(told: tuple[Path, list[str]]) -> None:
    seen = {found["adam"]: found["waits"] for line in told[1] if "waits" in line and (found := json.loads(line))}
    assert seen == dict.fromkeys(("apex", "deepspeed"), ["aten._local_scalar_dense.default from step"] * 2)
