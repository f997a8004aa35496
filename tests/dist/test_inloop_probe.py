"""Probes while training, on ranks that share weights and samples, find what one process finds in the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.features import load_encoder
from tests.launch import TINY, run
from tests.unit.test_inloop_probe import PROBED, told_right
from tests.unit.test_probe import tiny


@pytest.mark.parametrize(("stage", "tensor_ranks"), [(3, 1), (1, 2)])
def test_probes_on_two_ranks(tmp_path: Path, stage: int, tensor_ranks: int) -> None:
    layout = (f"train.deepspeed=ds_configs/zero{stage}.json", f"train.tensor_parallel={tensor_ranks}", "train.steps=4")
    run("pretrain", TINY, f"run.dir={tmp_path / 'with'}", *layout, *PROBED, ranks=2)
    if stage == 3:
        run("pretrain", TINY, f"run.dir={tmp_path / 'without'}", *layout, ranks=2)
        metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("without", "with")]
        assert metrics[0] == metrics[1]
    found = [json.loads(line) for line in (tmp_path / "with/eval.jsonl").read_text().splitlines()]
    expected = told_right(load_encoder(tmp_path / "with"), tiny(), tiny().data.path, 200, 100)
    assert [line.pop("step") for line in found] == [2, 4] and found[1] == pytest.approx(expected, abs=0.011)
