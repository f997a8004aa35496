"""python -m finetune on images, as a user starts it: layouts, kills, best checkpoints, starts, and the comparison."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from pretrain import full
from tests.dist.test_resume import progress, wait_for
from tests.launch import TINY, assert_close, finetune, run, start, weights

TINY_FINETUNE = "tests/tiny_finetune.yaml"
RECIPE = (
    *("image.operations=2", "image.erase=0.25", "image.mixup=0.7", "image.cutmix=1.0", "image.mix_prob=0.9"),
    *("image.smoothing=0.1", "model.dropout.path=0.2", "model.dropout.attention=0.1", "optim.clip_norm=1"),
)
LIMITED = ("data.labels=40", "eval.batch_size=2000")


def lines(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_all_layouts_train_the_same_network(tmp_path: Path) -> None:
    """What follows from the sample alone; mixes and drop path are drawn by each rank for its share."""
    common = (TINY_FINETUNE, "image.smoothing=0.1", "optim.lr=1e-2")
    run("finetune", *common, f"run.dir={tmp_path / 'one'}")
    mechanics = ("train.deepspeed=ds_configs/zero3.json", "train.tensor_parallel=2")
    run("finetune", *common, f"run.dir={tmp_path / 'four'}", *mechanics, ranks=4)
    one, four = (lines(tmp_path / name, "metrics") for name in ("one", "four"))
    assert [m["loss"] for m in four] == pytest.approx([m["loss"] for m in one], rel=1e-5)
    assert [m["grad_norm"] for m in four] == pytest.approx([m["grad_norm"] for m in one], rel=1e-4)
    assert len(one) == 6
    assert_close(weights(tmp_path / "four"), weights(tmp_path / "one"), bound=1e-4)
    one, four = (lines(tmp_path / name, "eval") for name in ("one", "four"))
    assert [e["step"] for e in four] == [3, 6]
    for ours, expected in zip(four, one, strict=True):
        assert ours == pytest.approx(expected, abs=2 / 2000)  # a tie may fall otherwise


def test_a_killed_run_continues_byte_for_byte(tmp_path: Path) -> None:
    common = (TINY_FINETUNE, *RECIPE, *LIMITED, "train.steps=24", "eval.every=4", "run.save_every=5", "run.keep_last=1")
    run("finetune", *common, f"run.dir={tmp_path / 'expected'}")
    folder = tmp_path / "run"
    process = start("finetune", *common, f"run.dir={folder}", "data.workers=1")
    wait_for(lambda: progress(folder) > 7, process)  # between two checkpoints
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run("finetune", *common, f"run.dir={folder}")
    for name in ("metrics.jsonl", "eval.jsonl", "checkpoints/best", "labels.json"):
        assert (folder / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name
    ours, expected = weights(folder), weights(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    evaluations = lines(folder, "eval")
    best = max(evaluations, key=lambda line: line["test/accuracy"])  # the first of equals
    assert (folder / "checkpoints" / "best").read_text() == f"step_{best['step']:08d}\n"
    kept = {path.name for path in (folder / "checkpoints").glob("step_*")}
    assert kept == {f"step_{best['step']:08d}", "step_00000024"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that split every layer at ZeRO 3."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    mechanics = ("train.deepspeed=ds_configs/zero3.json", "train.tensor_parallel=2")
    run("pretrain", TINY, f"run.dir={folder}", "train.steps=3", *mechanics, ranks=2)
    return folder


def test_starts_from_runs_and_files_and_keeps_a_head_that_fits(tmp_path: Path, pretrained: Path) -> None:
    still = (TINY_FINETUNE, *LIMITED, "train.steps=1", "eval.every=0")  # the first update has rate 0
    origin = full.read(pretrained).encoder()
    full.write(full.read(pretrained), tmp_path / "start.safetensors")
    size = ("model.image.size=42", "train.deepspeed=ds_configs/zero2.json")
    told = finetune(
        (*still, f"run.dir={tmp_path / 'a'}", f"train.init_from={pretrained}"),
        (*still, f"run.dir={tmp_path / 'b'}", f"train.init_from={tmp_path / 'start.safetensors'}", *size),
        (*still, f"run.dir={tmp_path / 'c'}", f"train.init_from={tmp_path / 'a'}", "train.seed=9"),
    )
    first, second, third = (full.read(tmp_path / name) for name in "abc")
    for found in (first, second):
        assert all(torch.equal(tensor, origin[name]) for name, tensor in found.encoder().items())
    assert (second.model.image.positions, second.model.image.grid) == (4, 6)
    assert torch.equal(third.tensors["head.linear.weight"], first.tensors["head.linear.weight"])
    assert f"weights: {tmp_path / 'a'}, step 1" in told
    given = (*still, f"run.dir={tmp_path / 'd'}", f"train.init_from={tmp_path / 'a'}", "which=teacher")
    teacher = run("finetune", *given, status=2)
    assert "a fine-tuned model has no teacher" in teacher.stderr and teacher.stderr.count("\n") == 1


def test_comparison_from_few_labels_to_more(tmp_path: Path, pretrained: Path) -> None:
    arguments = (TINY_FINETUNE, "eval.every=0", "eval.batch_size=2000", f"train.init_from={pretrained}")
    options = ("--labels", "20", "all", "--seeds", "1", "--out", str(tmp_path / "out"))
    special = ("20:train.steps=2", "scratch:optim.lr=2e-3", "scratch,all:train.steps=4")
    options += tuple(word for override in special for word in ("--override", override))
    done = run("finetune.compare", *arguments, *options)
    assert done.stdout.count("trial ") == 4 and "test/accuracy x 100" in done.stdout
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["figures"]
    assert {arm: {n: len(v) for n, v in amounts.items()} for arm, amounts in found.items()} == {
        arm: {"20": 1, "all": 1} for arm in ("pre-trained", "scratch")
    }
    trial = tmp_path / "out" / "scratch_all_seed1"
    settings = full.settings(trial)
    assert (settings["train"]["steps"], settings["optim"]["lr"], settings["train"]["init_from"]) == (4, 2e-3, "")
    few = full.settings(trial.with_name("pre-trained_20_seed1"))
    assert settings["data"]["labels"] is None and few["data"]["labels"] == 20
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    again = run("finetune.compare", *arguments, *options)
    assert "trial " not in again.stdout and (tmp_path / "out" / "table.txt").read_text() in again.stdout
    other = run("finetune.compare", *arguments, *options, "optim.weight_decay=0.1", status=2)
    assert "optim.weight_decay: 0.05 -> 0.1" in other.stderr and other.stderr.count("\n") == 1
