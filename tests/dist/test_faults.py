"""When a rank, the disk or a machine fails: the job ends within a minute, says why, and nothing saved is lost."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import latest
from tests.e2e.test_program import lines
from tests.launch import ROOT, TIMEOUT, TINY, command, environment, finish, free_port, run, spawn

WITHIN = 60.0  # seconds from a rank's end to the job's
COMMON = (TINY, "train.deepspeed=ds_configs/zero1.json", "train.steps=20", "run.log_every=20", "watch.silent_seconds=4")
SAVING = ("train.steps=8", "run.save_every=2", "run.keep_last=1", "run.log_every=1")


class Ranks:
    """Processes started one by one, as by a launcher that does not end the others when one ends; one screen."""

    def __init__(self, folder: Path, module: str, *args: str, ranks: int = 2) -> None:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, **place}
        self._screen = folder / "screen.txt"
        with self._screen.open("a") as screen:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", module, *args, f"run.dir={folder / 'run'}"],
                    cwd=ROOT,
                    env=environment() | {k: str(v) for k, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
                    stdout=screen,
                    stderr=screen,
                    start_new_session=True,
                )
                for rank in range(ranks)
            ]

    @property
    def screen(self) -> str:
        return self._screen.read_text()

    def statuses(self) -> list[int]:
        """Waits for all; after the first has ended, the others have a minute."""
        deadline = time.monotonic() + TIMEOUT
        ended = False
        try:
            while any(process.poll() is None for process in self.processes):
                if not ended and any(process.poll() is not None for process in self.processes):
                    ended, deadline = True, time.monotonic() + WITHIN
                assert time.monotonic() < deadline, f"the job hangs\n{self.screen}"
                time.sleep(0.05)
        finally:
            for process in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return [process.returncode for process in self.processes]


@pytest.fixture
def faulty(tmp_path: Path) -> Callable[..., Ranks]:
    def start(fault: str, rank: int, *more: str) -> Ranks:
        return Ranks(tmp_path, "tests.dist.faulty", fault, str(rank), *COMMON, *more)

    return start


def test_a_rank_that_raises(faulty: Callable[..., Ranks]) -> None:
    ranks = faulty("raises", 1)
    assert ranks.statuses() == [1, 1]
    first, *rest = ranks.screen[ranks.screen.index("rank 0 ends: ") :].splitlines()
    assert f"rank 1 ({socket.gethostname()}, pid {ranks.processes[1].pid}) failed: RuntimeError: this rank" in first
    assert rest[0] == "rank 1: Traceback (most recent call last):"
    assert rest[-1] == "rank 1: RuntimeError: this rank is out of luck"
    assert all(line.startswith("rank 1: ") for line in rest)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed(faulty: Callable[..., Ranks], victim: int) -> None:
    """Rank 0 keeps the store, through which the others would learn of it."""
    ranks = faulty("killed", victim)
    statuses = ranks.statuses()
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == 1
    name = f"rank {victim} ({socket.gethostname()}, pid {ranks.processes[victim].pid})"
    last = ranks.screen.splitlines()[-1]
    assert last.startswith(f"{name}: not heard of for 4 s" if victim else f"rank 1 ends: {name}, or the launcher")
    assert "Traceback" not in ranks.screen


def test_a_rank_that_cannot_read_its_data(faulty: Callable[..., Ranks]) -> None:
    ranks = faulty("data", 1)
    assert ranks.statuses() == [2, 2]
    assert ranks.screen.splitlines()[-1] == "error: 16 images in a row could not be decoded"
    assert "Traceback" not in ranks.screen


def test_torchrun_blames_the_rank_that_failed(tmp_path: Path) -> None:
    done = run("tests.dist.faulty", "raises", "1", *COMMON, f"run.dir={tmp_path}", ranks=2, status=1)
    assert "rank 1: RuntimeError: this rank is out of luck" in done.stderr
    cause = done.stderr[done.stderr.index("Root Cause") :]
    assert "local_rank: 1" in cause and "local_rank: 0" not in cause


def test_a_rank_that_sleeps(faulty: Callable[..., Ranks], tmp_path: Path) -> None:
    """All ranks' stacks are dumped, those that wait and the one that they wait for are told apart, the run ends."""
    limits = ("watch.slow_seconds=1", "watch.slow_step=1", "watch.hang_minutes=0.1", "watch.silent_seconds=40")
    ranks = faulty("sleeps", 1, *limits)
    assert ranks.statuses() == [1, 1]
    sleeper = f"rank 1 ({socket.gethostname()}, pid {ranks.processes[1].pid}) at dist/faulty.py:"
    for begin in (r"step 8 has taken \d+\.?\d* s, and ", "stopped: step 8 has taken over watch.hang_minutes=0.1: "):
        line = next(line for line in ranks.screen.splitlines() if re.match(begin, line))
        assert f"stacks in {tmp_path}/run/stacks/rank_*.txt; {sleeper}" in line and "fall_asleep" in line
        assert line.endswith(f"; rank 0 ({socket.gethostname()}, pid {ranks.processes[0].pid}) waits for other ranks")
    stacks = [(tmp_path / "run" / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert all("step 8 has taken too long" in text and "in run" in text for text in stacks)
    assert "fall_asleep" in stacks[1] and "fall_asleep" not in stacks[0]


def test_torchrun_restarts_what_has_failed(tmp_path: Path) -> None:
    """With a store for each attempt: in a shared one PyTorch's groups find the addresses of ranks that have ended."""
    launcher = command("tests.dist.faulty", "raises once", "1", *COMMON, *SAVING, f"run.dir={tmp_path}", ranks=2)
    launcher.insert(launcher.index("--standalone"), "--max-restarts=1")
    done = finish(spawn(launcher, environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}))
    assert "rank 1: RuntimeError: this rank is out of luck" in done.stderr
    assert "resuming after step 6" in done.stdout and "belongs to another run" not in done.stderr


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("config", "the config: rank 1 ({}) has optim.lr=0.5, not 0.001; compared with rank 0 ("),
        ("code", "the code: rank 1 ({}) has pretrain/train.py=another, not "),
        ("samples", "the data: rank 1 ({}) has samples=9999, not 10000 and index="),
    ],
)
def test_ranks_that_disagree_do_not_start(faulty: Callable[..., Ranks], fault: str, told: str, tmp_path: Path) -> None:
    ranks = faulty(fault, 1)
    assert ranks.statuses() == [2, 2]
    line = ranks.screen.splitlines()[-1]
    name = f"{socket.gethostname()}, pid {ranks.processes[1].pid}"
    assert line.startswith("error: ranks disagree on " + told.format(name))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds one checkpoint of 0.75 MB and not two, where this user may make one; otherwise a folder
    in which the fault "limit" keeps rank 1's files small."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", folder], capture_output=True)
    yield folder
    if not mounted.returncode:
        subprocess.run(["umount", "-l", folder], check=True)


def assert_saved(folder: Path, step: int) -> None:
    """`step` was saved last, it is what is there, and the run goes on from it to its end."""
    checkpoints = folder / "run" / "checkpoints"
    assert latest(checkpoints) == checkpoints / f"step_{step:08d}"
    continued = Ranks(folder, "pretrain", *COMMON, *SAVING)
    assert continued.statuses() == [0, 0], continued.screen
    assert f"resuming after step {step}" in continued.screen
    assert [line["step"] for line in lines(folder / "run" / "metrics.jsonl")] == list(range(1, 9))
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["latest", "step_00000008"]


def test_a_full_disk(small_disk: Path) -> None:
    mounted = os.path.ismount(small_disk)
    ranks = Ranks(small_disk, "tests.dist.faulty", "none" if mounted else "limit", "1", *COMMON, *SAVING)
    assert ranks.statuses() == [2, 2]
    said = ranks.screen.splitlines()[-1]
    assert said.startswith(f"error: cannot write {small_disk}/run/checkpoints/.partial-step_0000000")
    assert ("No space left on device" if mounted else "File too large") in said
    assert said.endswith("; nothing older is lost") and "Traceback" not in ranks.screen
    if mounted:
        subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert_saved(small_disk, 2 if mounted else 6)


def test_a_disk_that_is_full_when_the_pointer_moves(tmp_path: Path) -> None:
    """Only rank 0 writes it; the others must not wait."""
    ranks = Ranks(tmp_path, "tests.dist.faulty", "pointer", "0", *COMMON, *SAVING)
    assert ranks.statuses() == [2, 2]
    assert "on rank 0: [Errno 28] No space left on device; nothing older is lost" in ranks.screen.splitlines()[-1]
    assert_saved(tmp_path, 6)


def test_a_kill_before_any_operation_of_a_save(tmp_path: Path) -> None:
    """The newest checkpoint loads, and is the one before or the new one; saving a step again never leaves none."""
    new, again, left = run("tests.dist.save_worker", str(tmp_path)).stdout.splitlines()[-3:]
    steps = new.split()[1:]
    assert steps == sorted(steps) and {"1", "2"} == set(steps) and len(steps) > 20
    assert set(again.split()[1:]) == {"2"} and len(again.split()) > 20
    assert left == "left latest step_00000002"
