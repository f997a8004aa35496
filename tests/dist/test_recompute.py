"""Blocks that are computed again in the backward pass, dropout and layer drop included, change memory and nothing else;
compiled ones agree to rounding."""

import json

import pytest

from tests.launch import run

SCENARIOS = [f"tests/tiny_audio.yaml model.depth=8 train.deepspeed=ds_configs/zero{stage}.json" for stage in (0, 1, 3)]

COMPILED = ["tests/tiny.yaml train.deepspeed=ds_configs/zero1.json", "tests/tiny.yaml train.compile=true"]


@pytest.fixture(scope="module")
def seen():
    both = [*COMPILED]
    both += [f"{scenario}{more}" for scenario in SCENARIOS for more in ("", " train.recompute=true")]
    lines = run("tests.dist.recompute_worker", *both).stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"scenario"')]
    return {entry["scenario"]: entry for entry in found}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_recomputing_is_exact_and_saves_memory(seen, scenario):
    plain, again = seen[scenario], seen[f"{scenario} train.recompute=true"]
    assert again["losses"] == plain["losses"] and again["weights"] == plain["weights"]
    assert again["kept"] < 0.8 * plain["kept"]


def test_compiled_blocks_agree(seen):
    plain, compiled = (seen[scenario]["losses"] for scenario in COMPILED)
    assert compiled == pytest.approx(plain, rel=1e-5)
