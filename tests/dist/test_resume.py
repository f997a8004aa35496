"""A killed run continues as if nothing had happened: metrics byte for byte, weights bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.launch import TIMEOUT, TINY, pretrain, run, start, weights

STEPS = 40
COMMON = (TINY, f"train.steps={STEPS}", "run.save_every=3", "run.keep_last=2")


def args(folder: Path, stage: int, precision: str = "fp32") -> tuple[str, ...]:
    return (
        *COMMON,
        f"run.dir={folder}",
        f"train.deepspeed=ds_configs/zero{stage}.json",
        f"train.precision={precision}",
    )


def assert_identical(folder: Path, reference: Path) -> None:
    assert (folder / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    ours, expected = weights(folder), weights(reference)
    assert ours.keys() == expected.keys()
    assert any(key.startswith("teacher/") for key in ours)
    assert any("exp_avg_sq" in key for key in ours)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.0005)


def progress(folder: Path) -> int:
    try:
        return (folder / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module", params=[(0, "fp32"), (2, "bf16")], ids=str)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[int, str], Path]:
    """(ZeRO stage, precision) and the folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run("pretrain", *args(folder, *request.param))
    assert progress(folder) == STEPS
    return request.param, folder


def test_sigkill(tmp_path: Path, reference: tuple[tuple[int, str], Path]) -> None:
    mechanics, expected = reference
    folder = tmp_path / "run"
    draw = random.Random(mechanics[0])
    killed_while_writing = 0
    for attempt in range(3):
        process = start("pretrain", *args(folder, *mechanics))
        seen = progress(folder)
        wait_for(lambda seen=seen: progress(folder) > seen + draw.randint(1, 4), process)
        if attempt != 1:  # in the middle of writing a checkpoint
            wait_for(lambda: any((folder / "checkpoints").glob(".partial-*/*.safetensors")), process)
            killed_while_writing += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert killed_while_writing
    run("pretrain", *args(folder, *mechanics))
    assert_identical(folder, expected)
    assert not list((folder / "checkpoints").glob(".partial-*"))


def test_polite_signal(tmp_path: Path, reference: tuple[tuple[int, str], Path]) -> None:
    mechanics, expected = reference
    number = {0: signal.SIGTERM, 2: signal.SIGUSR1}[mechanics[0]]
    folder = tmp_path / "run"
    process = start("pretrain", *args(folder, *mechanics), "data.workers=1")
    wait_for(lambda: progress(folder) >= 5, process)
    os.killpg(process.pid, number)  # the loader's workers, too, as schedulers do
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75, out
    assert f"{number.name}: saved after step" in out
    run("pretrain", *args(folder, *mechanics))
    assert_identical(folder, expected)


def test_signal_to_one_of_two_ranks(tmp_path: Path) -> None:
    expected, folder = tmp_path / "expected", tmp_path / "run"
    process = start("pretrain", *args(folder, 1), ranks=2)
    wait_for(lambda: progress(folder) >= 5, process)
    ranks = [c for c in psutil.Process(process.pid).children() if "pretrain" in c.cmdline()]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=TIMEOUT)
    assert "saved after step" in out, err
    pretrain(args(folder, 1), args(expected, 1), ranks=2)
    assert_identical(folder, expected)
    for line in map(json.loads, (folder / "speed.jsonl").read_text().splitlines()):  # also the first after the stop
        assert line["images_per_s"] * line["seconds_per_step"] == pytest.approx(8), line


def test_checkpoints_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(
        "pretrain",
        TINY,
        "train.steps=12",
        "run.save_every=2",
        "run.keep_last=2",
        "run.keep_every=4",
        f"run.dir={folder}",
    )
    kept = sorted(p.name for p in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_00000004", "step_00000008", "step_00000010", "step_00000012"]
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000012\n"


def test_other_experiment_is_refused(tmp_path: Path) -> None:
    run("pretrain", TINY, "train.steps=2", f"run.dir={tmp_path}")
    done = run("pretrain", TINY, "train.steps=2", f"run.dir={tmp_path}", "optim.lr=0.5", status=2)
    assert "optim.lr: 0.001 -> 0.5" in done.stderr
    assert done.stderr.count("error:") == 1
