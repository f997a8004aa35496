"""Ranks that meet, look at each other and end, without training."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from pretrain import peers
from pretrain.peers import Peers
from pretrain.settings import ConfigError
from tests.launch import ROOT, TIMEOUT, environment, free_port


@pytest.fixture
def other_run(monkeypatch):
    """The store of a run of two ranks, with this process as a further rank of it or of another one."""
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    here = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in here.items():
        monkeypatch.setenv(name, str(value))
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return store


def refusal():
    with pytest.raises(ConfigError) as refused:
        Peers().join()
    place = f"127.0.0.1:{os.environ['MASTER_PORT']} "
    assert str(refused.value).startswith(place)
    return str(refused.value).removeprefix(place)


def test_a_port_of_another_run(other_run):
    of_others = dist.PrefixStore("peers/0", other_run)
    of_others.set("run", '[2, ""]')
    of_others.set("who/1", "rank 1 (far, pid 7)")
    assert refusal() == "belongs to another run, with rank 1 (far, pid 7); choose another MASTER_PORT"
    assert of_others.get("who/1") == b"rank 1 (far, pid 7)" and not of_others.check(["beat/1"])


def test_a_port_of_another_runs_ranks_to_come(other_run, monkeypatch):
    """Whom this rank would stand in for."""
    of_others = dist.PrefixStore("peers/0", other_run)
    of_others.set("run", '[4, ""]')
    assert refusal().startswith("belongs to another run, of 4 ranks;")
    of_others.set("run", '[2, "SLURM job 5, restart 0"]')
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert refusal().startswith("belongs to another run, SLURM job 5, restart 0;")
    assert not of_others.check(["who/1"]) and not of_others.check(["beat/1"])


@pytest.mark.parametrize("job", ["", "5"])
def test_ranks_of_one_run_meet(other_run, monkeypatch, job):
    """Also after torchrun has restarted them, which keeps the store; and where ssh did not bring SLURM's variables."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    dist.PrefixStore("peers/0", other_run).set("who/1", "rank 1 (here, pid 7)")
    of_run = dist.PrefixStore("peers/1", other_run)
    of_run.set("run", '[2, "SLURM job 5, restart 0"]')
    of_run.set("who/0", "rank 0 (here, pid 8)")
    met = Peers()
    met.join()
    assert met.who[0] == "rank 0 (here, pid 8)" and f"pid {os.getpid()}" in met.who[1]
    met.leave()


def test_a_port_that_is_taken(other_run, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert refusal() == "is in use by another process; choose another MASTER_PORT"


def test_questions_become_rare(monkeypatch):
    pauses = []
    monkeypatch.setattr(peers.time, "sleep", pauses.append)
    Peers._until(lambda: len(pauses) == 9)
    assert pauses == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0, 1.0]


def test_a_full_disk_keeps_no_rank_from_ending():
    end = "from pretrain import peers; print('a line'); peers._quit(3, 'the end')"
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-c", end]
        assert (
            subprocess.run(
                line, cwd=ROOT, env=environment() | {"PYTHONUNBUFFERED": ""}, stdout=full, stderr=full
            ).returncode
            == 3
        )


SUSPENDED = """
import os, signal, time
from concurrent.futures import ThreadPoolExecutor
from pretrain.peers import Peers

def beat():
    time.sleep(0.3)  # until the answer is waited for
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.3)

peers = Peers()
peers.silent = 2.0
with ThreadPoolExecutor(1) as store:
    assert peers._answer(store.submit(beat)) is None
    peers.silent = 0.1
    try:
        peers._answer(store.submit(time.sleep, 0.5))
    except TimeoutError as error:
        print(error)
"""


def test_a_rank_suspended_with_a_beat_under_way():
    """The store has had no chance to answer; one that has, and does not, is given up."""
    process = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED], cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE
    )
    killer = threading.Timer(TIMEOUT, process.kill)
    killer.start()
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate()
    killer.cancel()
    assert process.returncode == 0 and out == "no answer for 0.1 s\n"
