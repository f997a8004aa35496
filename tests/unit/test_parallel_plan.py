"""Memory, traffic and advice for many GPUs: by hand, and as the documentation has them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks import memory as measuring
from benchmarks import plan as planning
from benchmarks.memory import OTHER, Line
from pretrain.config import BatchPlan, batch_plan, load
from pretrain.layout import Group, Zero, groups
from pretrain.plan import memory
from pretrain.traffic import traffic

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "pretrain"
COMMAND = re.compile(r"```\n(python -m benchmarks\.plan .*)\n```\n\n(?=\||- )")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert planning.main(arguments) == 0
    return capsys.readouterr().out


def test_the_documented_tables_are_what_is_printed_now(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "parallelism.md").read_text()
    commands = COMMAND.findall(text)
    assert len(commands) >= 5 and text.count("| ZeRO | TP |") == sum("--brief" not in line for line in commands)
    for command in commands:
        expected = printed(capsys, *command.split()[3:])
        assert f"```\n{command}\n```\n\n{expected}\n" in text, command


def test_layout_by_hand() -> None:
    group = Group((5, 6, 8), True)
    assert (group.flat(1), group.flat(4)) == (20, 24)  # shards of 6, even
    assert group.partition(4) == 2 + 2 + 2
    # Shards are 0-6, 6-12, 12-18 and 18-24; parameters 0-5, 5-11 and 11-19.
    assert [group.touched(4, rank) for rank in range(4)] == [11, 14, 8, 8]


def test_states_of_a_published_model_by_hand() -> None:
    """bf16 on 64 ranks: 2 bytes a weight and a gradient, 12 of masters and moments, 2 + 4 of the teacher."""
    config = load(CONFIGS / "image_huge14.yaml")
    teacher = 536_320 + 629_899_520
    trained = teacher + 4_352 + 6_635_520
    assert sum(group.total for group in groups(config)) == trained
    for stage, weights, gradients, shards in ((1, 1, 1, 64), (3, 64, 64, 64)):
        found = memory(config, BatchPlan(64, 4, 1), Zero(stage, persistence=0))
        assert found.weights == pytest.approx(2 * trained / weights, rel=1e-4)
        assert found.gradients == pytest.approx(2 * trained / gradients, rel=1e-4)
        assert found.optimizer == pytest.approx(12 * trained / shards, rel=1e-4)
        assert found.teacher == pytest.approx(2 * teacher / weights + 4 * teacher / shards, rel=1e-4)


def test_tensor_parallel_traffic_by_hand() -> None:
    """ViT-H/14: 256 patches, of which 64 are seen, and a class token; 2 images on 4 ranks."""
    config = load(CONFIGS / "image_huge14.yaml", ["train.tensor_parallel=4", "train.batch_size=2"])
    tokens = 2 * (16 * 65 * 4 + 257 * 2)
    sent = traffic(config, batch_plan(config.train, 4), Zero(1))
    assert sent.tensor_parallel == (2 * 3 / 4 * 32 * tokens * 1280 * 2, 32 * 6)
    assert sent.data_parallel == (0, 0)


def test_what_cannot_be_is_said_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    table = printed(capsys, "--preset=image_base", "--gpus=8", "train.batch_size=16")
    assert "| 0, 1, 2, 3 | 8 |" in table and "must divide model.heads=12" in table
    table = printed(capsys, "--preset=image_base", "--gpus=32", "train.batch_size=16")
    assert "does not divide over 32 ranks" in table and "| 1 | 2 | 1 x 1 |" in table
    assert "Every rank has one sample" in table
    table = printed(capsys, "--preset=image_base", "--gpus=4", "train.precision=fp16")
    assert "| 0 | 2 |" in table and "| 1 | 2 | 128 x 1 |" in table and "needs ZeRO 1, 2 or 3" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--gpus=4096"],
            (
                "smaller than the 512 data-parallel ranks",
                "at most 2,048 GPUs",
                "Fewer are fastest so: 1,024 GPUs, **ZeRO 3 x TP 4**",
            ),
        ),
        (["--gpus=24", "--batch=25"], ("divides over none of the data-parallel ranks; 1, 5, 25 would do",)),
        (["--gpus=64", "--gpu-memory=2"], ("nothing fits. ZeRO 3 x TP 8 needs least", "offload")),
        (["--gpus=8"], ("**ZeRO 1**", "ZeRO 3", "TP 8 +")),
        (["--gpus=512", "--preset=text_large"], ("**ZeRO 3 x TP 8**", "Fewer are no slower: 128 GPUs")),
        (["--gpus=8", "--inter-bandwidth=1"], ("**ZeRO 1**",)),  # of links between nodes one node uses none
        (["--gpus=8", "--intra-bandwidth=1e9"], ("**ZeRO 3**",)),  # which sends least
    ],
)
def test_advice(arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, *arguments, "--brief")
    for word in words:
        assert word in said


def test_micro_batches_are_as_large_as_fits() -> None:
    config = load(CONFIGS / "image_huge14.yaml")  # 32 images a rank
    small = planning.Cluster(gpu_memory=30)
    found = [planning.way(config, 8, planning.Cluster()), planning.way(config, 8, small)]
    assert [(one.plan.micro_batch, one.plan.accumulation) for one in found] == [(32, 1), (8, 4)]
    assert all(one.fits for one in found)
    doubled = dataclasses.replace(found[1].plan, micro_batch=16, accumulation=2)
    assert memory(config, doubled, Zero(1)).total > 0.9 * 30 * 2**30


def test_a_bad_preset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert planning.main(["--preset=image_hug14"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("category", "measured", "status"),
    [("weights", 104, 0), ("weights", 106, 1), ("weights", 94, 1), (OTHER, 4, 0), (OTHER, 6, 1)],
)
def test_memory_that_is_apart_is_a_failure(category: str, measured: int, status: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr(measuring, "launch", lambda *_: [Line("1", "bf16", 2, 0, category, 100, measured)])
    monkeypatch.setattr("sys.argv", ["memory", "--ranks", "2", "--zero", "1"])
    assert measuring.main() == status
    assert ("more than 5% apart" in capsys.readouterr().out) == bool(status)
