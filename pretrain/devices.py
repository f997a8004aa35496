"""Which device this rank computes on; what was asked for and what there is must agree, here and on all ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch

from pretrain.peers import Peers


def choose_device(peers: Peers) -> torch.device:
    """The local rank's GPU, or the CPU where there is none. Raises ConfigError, on all ranks, if one has too few GPUs,
    others than its launcher promised, or none where others have some. To be called before any collective: backends that
    differ would wait for each other."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = "cuda" if gpus else "cpu"
    problem = mismatch(os.environ, gpus, os.path.exists("/dev/nvidiactl"))
    peers.agree("devices", json.dumps([kind, problem]), lambda values: disagreement(values, peers))
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpus else torch.device("cpu")


def mismatch(environment: Mapping[str, str], gpus: int, driver: bool) -> str:
    """What of `environment` the GPUs found contradict, or nothing. `driver`: NVIDIA's is there."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and driver:  # without one, the deepspeed launcher sets it, too
        named = [name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
        if len(named) != gpus:
            return f"CUDA_VISIBLE_DEVICES={visible} names {len(named)} GPUs, PyTorch finds {gpus}; {_REMEDY}"
    asked = environment.get("SLURM_GPUS_ON_NODE")
    if asked is not None and int(asked) != gpus:
        return f"SLURM gave this node {asked} GPUs (SLURM_GPUS_ON_NODE), PyTorch finds {gpus}; {_REMEDY}"
    here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if gpus and here > gpus:
        return f"{here} ranks were started on a machine with {gpus} GPUs; start one a GPU"
    return ""


def disagreement(values: list[str], peers: Peers) -> str:
    """What all ranks' (kind, mismatch) have against a start, in a sentence; empty if nothing."""
    kinds, problems = zip(*map(json.loads, values), strict=True)
    for rank, problem in enumerate(problems):
        if problem:
            return f"{peers.who[rank]}: {problem}" if peers.size > 1 else problem
    if len(set(kinds)) > 1:
        without = [rank for rank, kind in enumerate(kinds) if kind == "cpu"]
        return f"no GPU on {peers.names(without)}, but one on the other ranks; give all one, or none"
    return ""


_REMEDY = "look at nvidia-smi there, or unset both to train without GPUs"
