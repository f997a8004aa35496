"""Probes while training, on ranks that share weights and samples, find what one process finds in the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.features import load_encoder
from tests.launch import TINY, pretrain
from tests.unit.test_inloop_probe import PROBED, told_right
from tests.unit.test_probe import tiny

SHARDED = ("train.deepspeed=ds_configs/zero3.json", "train.steps=4")
SPLIT = ("train.deepspeed=ds_configs/zero1.json", "train.steps=4", "train.tensor_parallel=2")


def test_probes_on_two_ranks(tmp_path: Path) -> None:
    runs = {"sharded": (*SHARDED, *PROBED), "split": (*SPLIT, *PROBED), "without": SHARDED}
    pretrain(*([TINY, f"run.dir={tmp_path / name}", *given] for name, given in runs.items()), ranks=2)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("without", "sharded")]
    assert metrics[0] == metrics[1]
    for name in ("sharded", "split"):
        found = [json.loads(line) for line in (tmp_path / name / "eval.jsonl").read_text().splitlines()]
        expected = told_right(load_encoder(tmp_path / name), tiny(), tiny().data.path, 200, 100)
        assert [line.pop("step") for line in found] == [2, 4] and found[1] == pytest.approx(expected, abs=0.011)
