"""Which device this rank computes on; what was asked for and what there is must agree, here and on all ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch

from pretrain.peers import Peers

REMEDY = "look at nvidia-smi there, or set CUDA_VISIBLE_DEVICES to the GPUs to train on, empty for none"


def choose_device(peers: Peers) -> torch.device:
    """The local rank's GPU, the only one that it sees, or the CPU where there is none.

    Sets LOCAL_RANK to the GPU's number, by which DeepSpeed takes it. Raises ConfigError, on all ranks, if one has too
    few GPUs, others than its launcher promised, another rank's, or none where others have some. To be called before any
    collective: backends that differ would wait for each other.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    problem = mismatch(os.environ, gpus, os.path.exists("/dev/nvidiactl"))
    number = int(os.environ.get("LOCAL_RANK", "0")) if gpus > 1 else 0
    gpu = str(torch.cuda.get_device_properties(number).uuid) if gpus and not problem else ""
    peers.agree("devices", json.dumps([bool(gpus), gpu, problem]), lambda values: disagreement(values, peers))
    if not gpus:
        return torch.device("cpu")
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed has them agree
        if name in os.environ:
            os.environ[name] = str(number)
    return torch.device("cuda", number)


def mismatch(environment: Mapping[str, str], gpus: int, driver: bool) -> str:
    """What of `environment` the GPUs found contradict, or nothing. `driver`: NVIDIA's is there.

    CUDA_VISIBLE_DEVICES may name fewer GPUs than SLURM gave the node: one a rank, or those that the user wants.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    asked = environment.get("SLURM_GPUS_ON_NODE")
    given = int(asked or 0)
    if visible is None:
        if asked and given != gpus:
            return f"SLURM gave this node {given} GPUs (SLURM_GPUS_ON_NODE), PyTorch finds {gpus}; {REMEDY}"
    elif driver or given:  # the deepspeed launcher sets it without GPUs, too
        named = [name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
        if len(named) != gpus:
            return f"CUDA_VISIBLE_DEVICES={visible} names {len(named)} GPUs, PyTorch finds {gpus}; {REMEDY}"
    here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if gpus > 1 and here > gpus:  # those that see one each may see different ones
        return f"{here} ranks were started on a machine with {gpus} GPUs; start one a GPU"
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if gpus and here < given and tasks != "1" and tasks == environment.get("WORLD_SIZE"):  # ranks are srun's tasks
        started = f"srun started {here} {'task' if here == 1 else 'tasks'} on a node with {given} GPUs"
        return f"{started}; start one a GPU, or ask srun for fewer GPUs"
    return ""


def disagreement(values: list[str], peers: Peers) -> str:
    """What all ranks' (has GPUs, its own one's UUID, mismatch) have against a start, in a sentence, if anything."""
    found = [json.loads(value) for value in values]
    for rank, (_, _, problem) in enumerate(found):
        if problem:
            return f"{peers.who[rank]}: {problem}" if peers.size > 1 else problem
    without = [rank for rank, (gpus, _, _) in enumerate(found) if not gpus]
    if 0 < len(without) < len(found):
        return f"no GPU on {peers.names(without)}, but one on the other ranks; give all one, or none"
    owners: dict[str, int] = {}
    for rank, (gpus, gpu, _) in enumerate(found):
        if gpus and (owner := owners.setdefault(gpu, rank)) != rank:
            return f"{peers.who[owner]} and {peers.who[rank]} would both compute on GPU {gpu}; start one a GPU"
    return ""
