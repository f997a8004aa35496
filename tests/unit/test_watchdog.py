"""A hang ends, whatever the disk does."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, TIMEOUT, environment

HANG = """
import sys, time
from pathlib import Path
from pretrain.config import WatchConfig
from pretrain.peers import Peers
from pretrain.watchdog import Watchdog

def full(line):
    print(line, flush=True)
    raise OSError(28, "No space left on device")

limits = WatchConfig(slow_step=1, slow_seconds=0.5, hang_minutes=0.02)
watchdog = Watchdog(limits, Path(sys.argv[1]), Peers(), full)
for number in range(8):
    watchdog.step(number)
time.sleep(600)
"""


def hang(folder, **streams):
    line = [sys.executable, "-c", HANG, str(folder)]
    return subprocess.run(line, cwd=ROOT, env=environment(), text=True, timeout=TIMEOUT, **streams)


@pytest.fixture
def no_folder(tmp_path):
    path = tmp_path / "run"
    path.write_text("a file, in which there can be no stacks")
    return path


def test_stacks_that_cannot_be_written_are_shown(no_folder):
    done = hang(no_folder, capture_output=True)
    assert done.returncode == 1
    place = (
        f"stacks in {no_folder}/stacks/rank_*.txt (on the screen for {no_folder}/stacks/rank_0.txt: Not a directory)"
    )
    assert done.stdout.startswith("step 7 has taken ") and place in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("stopped: step 7 has taken over watch.hang_minutes=0.02") and place in last
    assert done.stderr.count('File "<string>", line 16 in <module>') == 2  # where it hangs, in both dumps


def test_a_screen_that_cannot_be_written(no_folder):
    with Path("/dev/full").open("w") as full:
        assert hang(no_folder, stdout=full, stderr=full).returncode == 1
