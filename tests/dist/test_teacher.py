"""The sharded teacher equals an unsharded average, at every stage and precision, on one rank and on two."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launch import run

LOW_PRECISION_ROUNDING = {"torch.float32": 2e-6, "torch.bfloat16": 2**-8, "torch.float16": 2**-11}


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def scenarios(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """For each stage and precision, what each rank saw."""
    folder = tmp_path_factory.mktemp("teacher")
    run("tests.dist.teacher_worker", str(folder), ranks=request.param)
    ranks = [(folder / f"rank{r}.jsonl").read_text().splitlines() for r in range(request.param)]
    return [[json.loads(line) for line in lines] for lines in zip(*ranks, strict=True)]


def test_equals_unsharded_average(scenarios: list[list[dict[str, Any]]]) -> None:
    assert len(scenarios) == 18
    for ranks in scenarios:
        for seen in ranks:
            assert seen["starts_equal"], seen
            assert seen["moved"] > 1e-4, seen  # the student did train, so a teacher that stands still would show
            assert seen["error"] <= 1e-6, seen
            assert seen["published"] <= 1.01 * LOW_PRECISION_ROUNDING[seen["dtype"]], seen


def test_shards_are_disjoint_and_complete(scenarios: list[list[dict[str, Any]]]) -> None:
    for ranks in scenarios:
        owned = [seen["owned"] for seen in ranks]
        if ranks[0]["zero"] == "0":
            assert owned == [ranks[0]["total"]] * len(ranks)
        else:
            assert sum(owned) == ranks[0]["total"]
            assert max(owned) <= 0.7 * ranks[0]["total"] or len(ranks) == 1


def test_update_communicates_only_to_publish_flat_buffers(scenarios: list[list[dict[str, Any]]]) -> None:
    """Nothing at stages 0 and 3; at 1 and 2 one gathering for each of the teacher's two parameter groups."""
    for ranks in scenarios:
        flat = ranks[0]["zero"][0] in "12" and len(ranks) > 1
        assert [seen["communicated"] for seen in ranks] == [2 if flat else 0] * len(ranks), ranks


def test_non_finite_gradient_moves_nothing(scenarios: list[list[dict[str, Any]]]) -> None:
    """A NaN on one rank: weights, masters, moments and teacher stay bit for bit, on all ranks."""
    for ranks in scenarios:
        for seen in ranks:
            assert not seen["bad_applied"], seen
            assert seen["bad_untouched"], seen
            assert seen["bad_step"] == 0, seen
            assert seen["scale_ratio"] == (0.5 if seen["precision"] == "fp16" else 1.0), seen


def test_precisions_train_alike(scenarios: list[list[dict[str, Any]]]) -> None:
    """How far the weights moved in four steps differs by rounding alone."""
    moved = [ranks[0]["moved"] for ranks in scenarios]
    assert max(moved) <= 1.05 * min(moved)
