"""Processes: who this rank is, which device it has, starting and ending the process group."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist

from pretrain.config import data_ranks
from pretrain.devices import choose_device
from pretrain.eager import uncompiled
from pretrain.launchers import identify
from pretrain.peers import Peers

# How long a collective waits for a rank. Ranks that have died or hang are found out otherwise, and sooner
# (docs/faults.md); one that writes its checkpoint to a slow disk is to be waited for.
COLLECTIVES = timedelta(days=1)


T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Tensor-parallel peers, who split every layer and see the same batches, are neighbours: with 2 of them, ranks 0
    and 1. Ranks that have the same part of the layers are data-parallel peers: 0, 2, 4..."""

    rank: int
    size: int
    device: torch.device
    tensor_ranks: int = 1
    data_group: dist.ProcessGroup | None = None  # None: all ranks
    tensor_group: dist.ProcessGroup | None = None  # None: this rank alone
    peers: Peers = field(default_factory=Peers)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        return self.size // self.tensor_ranks

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_ranks

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_ranks

    def share(self, work: Sequence[T]) -> tuple[list[T], int]:
        """This data rank's part of some forward passes, and how many they are. Behind them come as many more as others
        have: where ranks gather each other's weights, all take part in the same number."""
        own = list(work[self.data_rank :: self.data_ranks])
        rounds = -(-len(work) // self.data_ranks)
        return own + list(work[:1]) * (rounds - len(own)), len(own)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up over the batch's shares, in place."""
        if self.data_ranks > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def as_main(self, flag: bool) -> bool:
        """What rank 0 says. Collective."""
        if self.size == 1:
            return flag
        said = torch.tensor(int(flag), device=self.device)
        dist.broadcast(said, 0)
        return bool(said)

    def sum_slices(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up over the slices of split layers, in place."""
        if self.tensor_ranks > 1:
            dist.all_reduce(tensor, group=self.tensor_group)
        return tensor


class ParallelState:
    """What DeepSpeed asks of its `mpu` about the groups of a world with tensor parallelism."""

    def __init__(self, world: World) -> None:
        self.world = world

    def get_model_parallel_rank(self) -> int:
        return self.world.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.world.tensor_ranks

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.world.tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self.world.rank - self.world.tensor_rank

    def get_data_parallel_rank(self) -> int:
        return self.world.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.world.data_ranks

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.world.data_group

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_group(self) -> None:
        return None


def start(tensor_ranks: int = 1, peers: Peers | None = None) -> World:
    """Joins the process group of the launcher, or makes one of this process alone.

    Raises ConfigError, on all ranks, if they do not meet, if their devices do not agree, or if they cannot be divided
    into groups of `tensor_ranks`. `peers` are to watch over each other.
    """
    identify()
    if peers is None:
        peers = Peers()  # nobody watches over tools
    else:
        peers.join()
    device = choose_device(peers)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean fp32
    else:
        keep_freed_memory()
    # DeepSpeed calls collectives by names that torch 2.13 warns of, each time.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    # On CPU, DeepSpeed would compile a shared-memory collective here; a killed rank leaves its lock behind, on which
    # every later start waits for ever. gloo does without.
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    backend = "nccl" if device.type == "cuda" else "gloo"
    gc.freeze()  # imports are looked through no more: ZeRO 3 collects garbage at its start
    deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVES, verbose=False)
    world = World(dist.get_rank(), dist.get_world_size(), device, peers=peers)
    return split_world(world, tensor_ranks)


def split_world(world: World, tensor_ranks: int) -> World:
    """A world of the same ranks with groups of `tensor_ranks` who share layers. Collective."""
    if tensor_ranks == 1:
        return world
    data_ranks(world.size, tensor_ranks)  # refuses what leaves a rest
    if world.device.type == "cpu":  # megatron-core warns if it is not set; on GPUs it has to be before the start
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with warnings.catch_warnings(action="ignore"), uncompiled():  # that Apex is not installed
        from megatron.core import parallel_state  # takes seconds, and only this needs it

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_ranks,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=COLLECTIVES // timedelta(minutes=1),
    )
    return replace(
        world,
        tensor_ranks=tensor_ranks,
        data_group=parallel_state.get_data_parallel_group(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
    )


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
    """Without this, ranks now and then die with SIGABRT at exit: a thread of gloo's that has yet to let go of the last
    collective's tensors needs the interpreter for it, which is ending (pytorch/pytorch#190489)."""
    if dist.is_initialized():
        dist.destroy_process_group()
        settle()


def settle(seconds: float = 2.0) -> None:
    """Waits until other threads rest, at most so long; where there is no /proc, 20 ms. One that waits for the network
    rests, too."""
    rests, until = 0, time.monotonic() + seconds
    while rests < 2 and time.monotonic() < until:
        time.sleep(0.01)  # whoever waits for the interpreter has it now
        rests = 0 if others_run() else rests + 1


def others_run() -> bool:
    """Whether a thread of this process beside the calling one runs, or would if it had a core."""
    own = str(threading.get_native_id())
    threads = [path for path in Path("/proc/self/task").glob("*/stat") if path.parent.name != own]
    with suppress(OSError):  # some may end meanwhile
        return any(path.read_text().rpartition(")")[2].split()[0] == "R" for path in threads)
    return True
