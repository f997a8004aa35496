"""Every launcher, run for real, trains the same: srun in test_slurm.py, the others here."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from tests.launch import TINY, command, environment, finish, free_port, spawn

BIN = Path(sys.executable).parent
DEEPSPEED = str(BIN / "deepspeed")
PROGRAM = ("--module", "pretrain", TINY)
# Runs the command of an `ssh [options] HOST command...` here, and writes the host's name down.
SSH = """#!/bin/sh
while case $1 in -o|-p|-l) shift 2;; -*) shift;; *) false;; esac; do :; done
echo "$1" >> "$HOSTS_SEEN"
shift
exec sh -c "$*"
"""


def launch(*line: str, **more: str) -> str:
    """Runs a launcher's command line to its end; its output. `more`: environment."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = finish(spawn(list(line), environment() | {"PATH": path} | more))
    return done.stdout + done.stderr


def metrics(folder: Path) -> bytes:
    found = (folder / "metrics.jsonl").read_bytes()
    assert found.count(b"\n") == 5
    return found


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The curve of two ranks."""
    folder = tmp_path_factory.mktemp("torchrun")
    launch(*command("pretrain", TINY, f"run.dir={folder}", ranks=2))
    return metrics(folder)


def test_one_rank(tmp_path: Path) -> None:
    launch(*command("pretrain", TINY, f"run.dir={tmp_path / 'python'}"))
    port = str(free_port())
    launch(DEEPSPEED, "--num_gpus=1", f"--master_port={port}", *PROGRAM, f"run.dir={tmp_path / 'deepspeed'}")
    assert metrics(tmp_path / "deepspeed") == metrics(tmp_path / "python")


def test_deepspeed(tmp_path: Path, torchrun: bytes) -> None:
    port = str(free_port())
    launch(DEEPSPEED, "--num_gpus=2", f"--master_port={port}", *PROGRAM, f"run.dir={tmp_path}")
    assert metrics(tmp_path) == torchrun


@pytest.mark.skipif(not shutil.which("pdsh"), reason="NOT RUN: deepspeed --hostfile needs pdsh (apt-get install pdsh)")
def test_deepspeed_with_a_hostfile(tmp_path: Path, torchrun: bytes) -> None:
    """Two names of this host. pdsh is the real one; the ssh under it is a stand-in that stays here."""
    hosts, ssh = tmp_path / "hostfile", tmp_path / "bin" / "ssh"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    rendezvous = ("--master_addr=127.0.0.1", f"--master_port={free_port()}")
    launch(
        *(DEEPSPEED, f"--hostfile={hosts}", *rendezvous, *PROGRAM, f"run.dir={tmp_path / 'run'}"),
        PATH=f"{ssh.parent}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}",
        HOSTS_SEEN=str(tmp_path / "seen"),
    )
    assert metrics(tmp_path / "run") == torchrun
    assert set((tmp_path / "seen").read_text().split()) == {"node-a", "node-b"}


@pytest.mark.skipif(not shutil.which("mpirun"), reason="NOT RUN: mpirun is not here (apt-get install openmpi-bin)")
def test_mpirun(tmp_path: Path, torchrun: bytes) -> None:
    """DeepSpeed asks mpi4py for the ranks; the address and port that are given stay."""
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    line = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, "-m", "pretrain", TINY]
    launch(*line, f"run.dir={tmp_path}", **allowed, **where)
    assert metrics(tmp_path) == torchrun
