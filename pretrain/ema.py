"""The teacher's weights: an exponential moving average in fp32, sharded as the optimizer shards its fp32 masters.

Each rank averages the shard of the student's masters that it owns, without communication. What the forward pass reads,
the low-precision teacher parameters, follows from the shards: copied at stage 0, gathered once per flat buffer at
stages 1 and 2; at stage 3 they are shards themselves, which the engine gathers block by block. On a GPU an average is
moved and copied in one pass, a launch a tensor: for each parameter at stage 0, for each of the optimizer's flat buffers
(two; at stage 3 one a sub-group of each) above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from models.data2vec import Data2Vec
from models.fused import kernels
from pretrain.pieces import TEACHER, masters, stretches


class ShardedTeacher:
    """Owns the fp32 average of `model.tracked()` under `engine`.

    Raises RuntimeError if a parameter's fp32 master cannot be found: a teacher that silently stands still is the worst
    of failures.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, model: Data2Vec) -> None:
        self.masters: list[Tensor] = []  # the student's, fp32
        self.averages: list[Tensor] = []  # the teacher's, fp32, same shapes
        self._copies: list[Tensor | None] = []  # of the averages, in low precision or on another device
        self._gathered: list[tuple[Tensor, dist.ProcessGroup]] = []  # buffers of which this rank has written its shard
        self._average_of: dict[int, Tensor] = {}  # id of the optimizer's tensor -> average
        pairs, stage = list(model.tracked()), engine.zero_optimization_stage()
        with torch.no_grad():
            if stage == 3:
                self._adopt_partitions(engine.optimizer, pairs)
            elif stage:
                self._adopt_flat_groups(engine.optimizer, pairs)
            else:
                self._adopt_parameters(engine, pairs)
        self.pieces = [
            s.of(self._average_of[id(s.tensor)], f"{TEACHER}/{s.name.removeprefix('student.')}")
            for s in stretches(engine)
            if id(s.tensor) in self._average_of
        ]
        """What this rank owns of the average."""

    def update(self, decay: float) -> None:
        """teacher = decay * teacher + (1 - decay) * student (docs/method.md 1.9). At decay 1 nothing moves."""
        if decay >= 1:
            return
        with torch.no_grad():
            move(self.averages, self.masters, self._copies, 1 - decay)
            self._gather()

    @torch.no_grad()
    def publish(self) -> None:
        """Makes the forward pass see the averages."""
        for average, copy in zip(self.averages, self._copies, strict=True):
            if copy is not None:
                copy.copy_(average)
        self._gather()

    def _gather(self) -> None:
        for buffer, group in self._gathered:
            shard = buffer.view(dist.get_world_size(group), -1)[dist.get_rank(group)]
            dist.all_gather_into_tensor(buffer, shard, group=group)

    def _adopt(self, master: Tensor, average: Tensor, copy: Tensor | None) -> None:
        self.masters.append(master.data)
        self.averages.append(average)
        self._copies.append(copy)
        self._average_of[id(master)] = average

    def _adopt_parameters(self, engine: deepspeed.DeepSpeedEngine, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Stage 0: masters are whole, on every rank. In fp32 the teacher's parameters are the averages themselves."""
        master_of = {id(student): master for student, master in masters(engine)}
        for student, teacher in pairs:
            average = teacher.data.float()  # itself if it is fp32 already
            copy = None if teacher.dtype == torch.float32 else teacher.data
            self._adopt(master_of[id(student)], average, copy)

    def _adopt_flat_groups(self, optimizer: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Stages 1 and 2: the optimizer keeps a flat low-precision buffer a group, cut into equal shards, and the fp32
        master of its own shard. The teacher's parameters move into buffers laid out in just the same way."""
        teacher_of = {id(student): teacher for student, teacher in pairs}
        for index, group in enumerate(optimizer.bit16_groups):
            if not any(id(p) in teacher_of for p in group):
                continue
            flat, master = optimizer.bit16_groups_flat[index], optimizer.single_partition_of_fp32_groups[index]
            process_group = optimizer.real_dp_process_group[index]
            buffer = torch.zeros_like(flat)
            for student in group:
                teacher = teacher_of.pop(id(student))
                start = (student.data_ptr() - flat.data_ptr()) // flat.element_size()
                slot = buffer[start : start + student.numel()].view_as(student)
                slot.copy_(teacher)
                teacher.data = slot
            low = dist.get_rank(process_group) * master.numel()
            shard = buffer[low : low + master.numel()]
            if alike(shard, master):
                self._adopt(master, shard, None)
            else:
                self._adopt(master, shard.to(master), shard)
            if dist.get_world_size(process_group) > 1:
                self._gathered.append((buffer, process_group))
        if teacher_of:
            raise RuntimeError(f"ZeRO's groups lack {len(teacher_of)} of {len(pairs)} parameters to average")

    def _adopt_partitions(self, optimizer: Any, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Stage 3: the optimizer keeps the fp32 masters of this rank's partitions one after the other, a flat buffer a
        sub-group; averages are laid out in the same way, and the teacher's partitions are views of their copies or, in
        fp32, of themselves."""
        read_of: dict[int, Tensor] = {}  # id of the optimizer's tensor -> what the forward pass reads
        for student, teacher in pairs:
            group, offset, count = optimizer.grad_position[optimizer.get_param_id(student)]
            master = optimizer.fp32_partitioned_groups_flat[group]
            teacher.ds_persist = False  # what is small enough would stay gathered and never see an update
            teacher.partition()
            partition = teacher.ds_tensor
            if partition.numel() != count:
                raise RuntimeError(f"a partition of {partition.numel()} values is averaged from one of {count}")
            if id(master) not in self._average_of:
                average = torch.zeros_like(master.data)
                read = average if alike(partition, master) else partition.new_zeros(master.numel())
                self._adopt(master, average, None if read is average else read)
                read_of[id(master)] = read
            own = slice(offset, offset + count)
            self._average_of[id(master)][own].copy_(partition)
            slot = read_of[id(master)][own]
            slot.copy_(partition)
            partition.data = slot
        optimizer.persistent_parameters[:] = [p for p in optimizer.persistent_parameters if p.ds_persist]


def alike(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device) == (b.dtype, b.device)


def move(averages: Sequence[Tensor], masters: Sequence[Tensor], copies: Sequence[Tensor | None], weight: float) -> None:
    """averages += weight * (masters - averages), in fp32, and copies = averages, where there are any."""
    plain = []
    for average, master, copy in zip(averages, masters, copies, strict=True):
        if copy is not None and copy.device == average.device and kernels.triton("teacher", average):
            from models.fused.lerp import lerp

            lerp(average, master, weight, copy)
        else:
            plain.append((average, master, copy))
    if plain:
        torch._foreach_lerp_([average for average, _, _ in plain], [master for _, master, _ in plain], weight)
    for average, _, copy in plain:
        if copy is not None:
            copy.copy_(average)
