"""What is computed of memory and traffic is what four ranks hold and send, at every ZeRO stage and split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import TINY, run

RANKS = 4
# Wide enough for parameters over ZeRO 3's threshold of what stays gathered; two micro-steps.
WIDE = ["model.width=192", "model.decoder.width=64", "train.micro_batch=1"]
EAGER = {  # nothing but tiny parameters stays gathered, and the backward pass gathers again
    "stage": 3,
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "reduce_bucket_size": 200_000,
}
PARTLY = EAGER | {"stage3_max_reuse_distance": 800_000}  # what is used last stays gathered for the backward pass
OVERLAPPED = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 3_000_000}


def scenario(zero: str, precision: str, tensor_parallel: int = 1, path: str = TINY, *more: str) -> list[str]:
    size = 2 * RANKS // tensor_parallel
    return [
        *(path, *WIDE, f"train.deepspeed={zero}", f"train.precision={precision}", f"train.batch_size={size}"),
        *(f"train.tensor_parallel={tensor_parallel}", *more),
    ]


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """For each scenario what each rank held and sent."""
    folder = tmp_path_factory.mktemp("plan")
    own = {}
    for name, section in (("eager", EAGER), ("partly", PARTLY), ("overlapped", OVERLAPPED)):
        own[name] = str(folder / f"{name}.json")
        Path(own[name]).write_text(json.dumps({"zero_optimization": section}))
    wanted = [scenario(f"ds_configs/zero{z}.json", "bf16") for z in "012"]
    wanted += [scenario(f"ds_configs/zero{z}.json", "fp32") for z in "02"]
    wanted += [scenario(f"ds_configs/zero{z}_offload.json", "bf16") for z in "13"]
    wanted += [scenario("ds_configs/zero0.json", "fp16")]
    wanted += [scenario(own["eager"], "fp32"), scenario(own["overlapped"], "bf16")]
    wanted += [scenario(own["partly"], "fp32", 1, TINY, "model.depth=6")]
    wanted += [scenario("ds_configs/zero1.json", "fp32", 2)]
    audio = ["train.micro_batch=8000", f"train.batch_size={8000 * RANKS}", "model.dropout.layer=0"]
    wanted += [scenario("ds_configs/zero2.json", "bf16", 2, "tests/tiny_audio.yaml", *audio)]
    wanted += [scenario("ds_configs/zero3.json", "fp32", 2, "tests/tiny_text.yaml")]
    run("tests.dist.plan_worker", str(folder), json.dumps(wanted), ranks=RANKS)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    assert len(ranks[0]) == len(wanted)
    return [list(one) for one in zip(*ranks, strict=True)]


def test_sends_what_is_computed(scenarios: list[list[dict[str, Any]]]) -> None:
    for ranks in scenarios:
        for seen in ranks:
            for kind, sent in seen["sent"].items():
                assert sent["counted"] == pytest.approx(sent["expected"], rel=0.02), (seen["scenario"], kind)
            assert seen["sent"]["gradients"]["counted"] > 0


def test_every_kind_of_traffic_was_seen(scenarios: list[list[dict[str, Any]]]) -> None:
    seen = {kind for ranks in scenarios for kind, sent in ranks[0]["sent"].items() if sent["counted"]}
    assert seen == set(scenarios[0][0]["sent"])


def test_holds_what_is_computed(scenarios: list[list[dict[str, Any]]]) -> None:
    """Within 5%, category by category, and nothing that no category knows of."""
    for ranks in scenarios:
        for seen in ranks:
            apart = [line for line in seen["held"] if line["apart"]]
            assert not apart, (seen["scenario"], apart)
            held = {line["category"]: line["measured"] for line in seen["held"]}
            assert min(held[category] for category in ("weights", "gradients", "optimizer", "teacher")) > 0
