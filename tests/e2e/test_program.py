"""The program as a user meets it: what it leaves behind and how it stops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.dist.test_resume import progress, wait_for
from tests.launch import TINY, command, environment, finish, pretrain, run, spawn, start, weights


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_folder(tmp_path: Path) -> None:
    done = run("pretrain", TINY, "train.steps=4", "run.log_every=2", f"run.dir={tmp_path}")
    assert "step 4/4" in done.stdout
    for word in ("loss", "lr", "ema", "dev target", "pred", "images/s", "views/s", "left"):
        assert word in done.stdout
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [2, 4]
    assert {"loss", "grad_norm", "target_deviation", "prediction_deviation", "lr", "ema_decay"} < set(
        lines(tmp_path / "metrics.jsonl")[0]
    )
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["steps"] == 4
    again = run("pretrain", TINY, "train.steps=4", "run.log_every=2", f"run.dir={tmp_path}")
    assert "resuming after step 4" in again.stdout
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [2, 4]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_start_goes_without_torchs_compiler(tmp_path: Path, stage: int) -> None:
    """Which takes as long to import as all else."""
    zero = f"train.deepspeed=ds_configs/zero{stage}.json"
    line = command("pretrain", TINY, "train.steps=2", f"run.dir={tmp_path}", zero)
    told = finish(spawn(line, environment() | {"PYTHONPROFILEIMPORTTIME": "1"})).stderr
    names = {row.rsplit("|")[-1].strip() for row in told.splitlines()}
    assert "torch.optim" in names and "torch._dynamo" not in names


def test_divergence_stops_the_run(tmp_path: Path) -> None:
    done = run("pretrain", TINY, f"run.dir={tmp_path}", "run.save_every=1", "optim.lr=1e30", status=3)
    assert "the gradient is not finite" in done.stderr
    assert f"The last good checkpoint is {tmp_path}/checkpoints/step_" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(torch.isfinite(value).all() for name, value in weights(tmp_path).items() if name.startswith("teacher/"))


def test_collapse_stops_the_run(tmp_path: Path) -> None:
    limits = ("watch.after_steps=2", "watch.min_target_deviation=100")
    done = run("pretrain", TINY, f"run.dir={tmp_path}", "run.save_every=2", *limits, status=3)
    assert "step 3: collapse, target_deviation" in done.stderr
    assert "step_00000002" in done.stderr


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "images" / "deep" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (40, 50, 3), np.uint8)).save(path)
    return tmp_path / "images"


def test_broken_files_are_named_and_replaced(tmp_path: Path, folder_of_images: Path) -> None:
    (folder_of_images / "deep" / "07.png").write_bytes(b"not an image")
    given = (TINY, f"data.path={folder_of_images}", "train.steps=6", "data.max_failed_share=0.5")
    pretrain(*([*given, f"run.dir={tmp_path / name}", f"data.workers={n}"] for name, n in (("a", 2), ("b", 0))))
    log = (tmp_path / "a" / "log.txt").read_text()
    assert log.count("could not decode") == 2  # 48 samples: each file twice
    assert "07.png: not an image" in log
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab"]
    assert metrics[0] == metrics[1]  # whatever the workers


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_files(tmp_path: Path, folder_of_images: Path, workers: int) -> None:
    for path in folder_of_images.rglob("*.png"):
        path.write_bytes(b"")
    arguments = ("pretrain", TINY, f"data.path={folder_of_images}", f"run.dir={tmp_path}", f"data.workers={workers}")
    done = run(*arguments, status=2)
    assert [line for line in done.stderr.splitlines() if line.startswith("error: 16 images in a row could not be")]
    assert "Traceback" not in done.stderr


def test_other_data_is_refused_on_resume(tmp_path: Path, folder_of_images: Path) -> None:
    run("pretrain", TINY, "train.steps=2", f"data.path={folder_of_images}", f"run.dir={tmp_path / 'run'}")
    done = run("pretrain", TINY, "train.steps=2", f"run.dir={tmp_path / 'run'}", status=2)
    assert "has 10000 samples, this run began with 24" in done.stderr


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    run("pretrain", TINY, "train.steps=2", f"run.dir={tmp_path}")
    shard = next((tmp_path / "checkpoints").glob("step_*/shard_00000.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    done = run("pretrain", TINY, "train.steps=2", f"run.dir={tmp_path}", status=2)
    assert "step_00000002 is damaged" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "checkpoints" / "latest").write_text("step_00000001\n")
    done = run("pretrain", TINY, "train.steps=2", f"run.dir={tmp_path}", status=2)
    assert "names step_00000001, which is not there; these are: step_00000002" in done.stderr


def test_thresholds_stop_the_run(tmp_path: Path) -> None:
    done = run("pretrain", TINY, f"run.dir={tmp_path}", "watch.max_grad_norm=1e-3", status=3)
    assert "the gradient norm" in done.stderr and "watch.max_grad_norm=0.001" in done.stderr


def test_too_many_broken_files_stop_the_run(tmp_path: Path, folder_of_images: Path) -> None:
    for i in range(0, 24, 2):
        (folder_of_images / "deep" / f"{i:02}.png").write_bytes(b"")
    done = run(
        "pretrain", TINY, f"data.path={folder_of_images}", "train.steps=20", f"run.dir={tmp_path / 'a'}", status=2
    )
    assert "could not be decoded, more than data.max_failed_share=0.01" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=/nowhere"], "/nowhere does not exist"),
        (["data.path=tests/unit/data"], "no images in tests/unit/data"),
        (["train.deepspeed=ds_configs/zero9.json"], "ds_configs/ has zero0.json"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run("pretrain", TINY, f"run.dir={tmp_path}", *arguments, status=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def test_a_run_folder_is_one_runs(tmp_path: Path) -> None:
    """While another process trains in it; and not after, however that ended."""
    ours = ["pretrain", TINY, f"run.dir={tmp_path}", "run.save_every=100000"]
    process = start(*ours, "train.steps=100000")
    try:
        wait_for(lambda: progress(tmp_path) >= 1, process)
        assert f"another run is using run.dir={tmp_path}" in run(*ours, "train.steps=5", status=2).stderr
    finally:
        process.kill()
        process.communicate()
    run(*ours, "train.steps=5")
