"""Blocks that are computed again in the backward pass, dropout and layer drop included, change memory and nothing else."""

import json

import pytest

from tests.launch import run

SCENARIOS = [f"tests/tiny_audio.yaml model.depth=12 train.deepspeed=ds_configs/zero{stage}.json" for stage in (0, 1, 3)]


@pytest.fixture(scope="module")
def seen():
    both = [f"{scenario}{more}" for scenario in SCENARIOS for more in ("", " train.recompute=true")]
    lines = run("tests.dist.recompute_worker", *both).stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"scenario"')]
    return {entry["scenario"]: entry for entry in found}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_recomputing_is_exact_and_saves_memory(seen, scenario):
    plain, again = seen[scenario], seen[f"{scenario} train.recompute=true"]
    assert again["losses"] == plain["losses"] and again["weights"] == plain["weights"]
    assert again["kept"] < 0.8 * plain["kept"]
