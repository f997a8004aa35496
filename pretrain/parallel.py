"""Processes: who this rank is, which device it has, starting and ending the process group."""

from __future__ import annotations

import ctypes
import os
import socket
import warnings
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from pretrain.config import ConfigError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def start() -> World:
    """Joins the process group of the launcher (torchrun, deepspeed), or makes one of this process alone."""
    if "RANK" not in os.environ:
        with socket.socket() as free:  # without these five, DeepSpeed would look for MPI
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise ConfigError(f"{here} ranks were started on a machine with {gpus} GPUs; start one a GPU")
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean fp32
    else:
        keep_freed_memory()
    # DeepSpeed calls collectives by names that torch 2.13 warns of, each time.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    # On CPU, DeepSpeed would compile a shared-memory collective here; a killed rank leaves its lock behind, on which
    # every later start waits for ever. gloo does without.
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return World(dist.get_rank(), dist.get_world_size(), device)


def keep_freed_memory() -> None:
    """Has glibc keep large freed blocks for the next step rather than give them back and take page faults for new ones:
    some percent of a ViT-B step on two cores (benchmarks/README.md), at no more peak memory. Other C libraries are left
    as they are."""
    mmap_threshold, trim_threshold = -3, -1  # the parameters' numbers in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def stop() -> None:
    """Without this, ranks now and then die with SIGABRT at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
