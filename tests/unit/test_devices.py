"""GPUs asked for and found: what a rank refuses, and what ranks refuse together."""

import json

import pytest
import torch

from pretrain.config import ConfigError
from pretrain.devices import choose_device, disagreement, mismatch
from pretrain.peers import Peers


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
    ],
)
def test_what_a_rank_refuses(environment, gpus, told):
    found = mismatch(environment, gpus, driver=True)
    assert told in found and bool(told) == bool(found) and "\n" not in found


def test_without_a_driver_the_deepspeed_launcher_names_gpus_that_are_not_there():
    assert mismatch({"CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_WORLD_SIZE": "2"}, 0, driver=False) == ""


def three():
    peers = Peers()
    peers.size, peers.who = 3, ["rank 0 (a, pid 1)", "rank 1 (a, pid 2)", "rank 2 (b, pid 1)"]
    return peers


def test_ranks_refuse_together():
    same = [json.dumps(["cuda", ""])] * 3
    assert disagreement(same, three()) == ""
    one = [*same[:2], json.dumps(["cpu", ""])]
    assert (
        disagreement(one, three()) == "no GPU on rank 2 (b, pid 1), but one on the other ranks; give all one, or none"
    )
    assert disagreement([same[0], json.dumps(["cpu", "too few"]), same[2]], three()) == "rank 1 (a, pid 2): too few"


def test_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_device(Peers()) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 ranks were started on a machine with 1 GPUs"):
        choose_device(Peers())
