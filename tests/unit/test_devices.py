"""GPUs asked for and found: what a rank refuses, and what ranks refuse together."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from pretrain.devices import choose_device, disagreement, mismatch
from pretrain.peers import Peers
from pretrain.settings import ConfigError

SRUN = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_GPUS_ON_NODE": "8"}


@pytest.mark.parametrize(
    ("environment", "gpus", "told"),
    [
        ({}, 0, ""),
        ({}, 8, ""),
        ({"LOCAL_WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}, 8, ""),
        ({"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}, 0, ""),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0, ""),
        ({"LOCAL_WORLD_SIZE": "3"}, 2, "3 ranks were started on a machine with 2 GPUs"),
        ({"SLURM_GPUS_ON_NODE": "8"}, 7, "SLURM gave this node 8 GPUs (SLURM_GPUS_ON_NODE), PyTorch finds 7"),
        ({"SLURM_GPUS_ON_NODE": "8"}, 0, "SLURM gave this node 8 GPUs (SLURM_GPUS_ON_NODE), PyTorch finds 0"),
        ({"SLURM_GPUS_ON_NODE": "4"}, 8, "SLURM gave this node 4 GPUs (SLURM_GPUS_ON_NODE), PyTorch finds 8"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 1, "CUDA_VISIBLE_DEVICES=0,1 names 2 GPUs, PyTorch finds 1"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 0, "CUDA_VISIBLE_DEVICES=0 names 1 GPUs, PyTorch finds 0"),
        ({"SLURM_GPUS_ON_NODE": "0"}, 8, "SLURM gave this node 0 GPUs (SLURM_GPUS_ON_NODE), PyTorch finds 8"),
        ({"SLURM_GPUS_ON_NODE": ""}, 8, ""),
        # in an allocation of 8 GPUs: srun --gpus-per-task=1; one process and deepspeed --num_gpus=2; a GPU that is gone
        (SRUN | {"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16", "CUDA_VISIBLE_DEVICES": "0"}, 1, ""),
        ({"LOCAL_WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "8"}, 1, ""),
        ({"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "8"}, 2, ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2", "SLURM_GPUS_ON_NODE": "3"}, 2, "CUDA_VISIBLE_DEVICES=0,1,2 names 3 GPUs"),
        # srun with too few tasks, with all it was given, and as what has started torchrun or trains on CPUs
        (
            SRUN | {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "16"},
            8,
            "srun started 1 task on a node with 8 GPUs; start one a GPU, or ask srun for fewer GPUs",
        ),
        (SRUN | {"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"}, 8, ""),
        (SRUN | {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "64"}, 8, ""),
        (SRUN | {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "16", "CUDA_VISIBLE_DEVICES": ""}, 0, ""),
    ],
)
def test_what_a_rank_refuses(environment, gpus, told):
    found = mismatch(environment, gpus, driver=True)
    assert told in found and bool(told) == bool(found) and "\n" not in found
    if "PyTorch finds" in found:
        assert found.endswith("or set CUDA_VISIBLE_DEVICES to the GPUs to train on, empty for none")


def test_without_a_driver_only_slurm_is_believed():
    """The deepspeed launcher names GPUs that are not there."""
    named = {"CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_WORLD_SIZE": "2"}
    assert mismatch(named, 0, driver=False) == ""
    assert "names 2 GPUs, PyTorch finds 0" in mismatch(named | {"SLURM_GPUS_ON_NODE": "2"}, 0, driver=False)


def three():
    peers = Peers()
    peers.size, peers.who = 3, ["rank 0 (a, pid 1)", "rank 1 (a, pid 2)", "rank 2 (b, pid 1)"]
    return peers


def test_ranks_refuse_together():
    same = [json.dumps([True, f"GPU {rank}", ""]) for rank in range(3)]
    assert disagreement(same, three()) == ""
    assert disagreement([json.dumps([False, "", ""])] * 3, three()) == ""
    shared = "rank 0 (a, pid 1) and rank 1 (a, pid 2) would both compute on GPU 0-1; start one a GPU"
    assert disagreement([json.dumps([True, "0-1", ""])] * 2 + same[2:], three()) == shared
    one = [*same[:2], json.dumps([False, "", ""])]
    assert (
        disagreement(one, three()) == "no GPU on rank 2 (b, pid 1), but one on the other ranks; give all one, or none"
    )
    assert disagreement([same[0], json.dumps([False, "", "too few"]), same[2]], three()) == "rank 1 (a, pid 2): too few"


@pytest.fixture
def machine(monkeypatch):
    """Sets what PyTorch finds: GPUs with the UUIDs given."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def find(*uuids):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=uuids[i]))

    return find


class Told(Peers):
    """Keeps what this rank says to the others."""

    def agree(self, topic, value, judge):
        self.told = json.loads(value)
        super().agree(topic, value, judge)


def test_the_device(machine, monkeypatch):
    machine("a", "b")
    peers = Told()
    assert choose_device(peers) == torch.device("cuda", 1) and peers.told == [True, "b", ""]
    assert os.environ["LOCAL_RANK"] == "1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="3 ranks were started on a machine with 2 GPUs"):
        choose_device(peers)


def test_the_only_visible_device(machine, monkeypatch):
    """srun --gpus-per-task=1 shows each task one GPU, as number 0, which DeepSpeed has to take as well."""
    machine("b")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    peers = Told()
    assert choose_device(peers) == torch.device("cuda", 0) and peers.told == [True, "b", ""]
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"
