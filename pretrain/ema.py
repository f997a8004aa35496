"""The teacher's weights: an exponential moving average in fp32, sharded as the optimizer shards its fp32 masters.

Each rank averages the shard of the student's masters that it owns, without communication. What the forward pass reads,
the low-precision teacher parameters, follows from the shards: copied at stage 0, gathered once per flat buffer at
stages 1 and 2; at stage 3 they are shards themselves, which the engine gathers block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from models.data2vec import Data2Vec
from pretrain.pieces import TEACHER, masters, stretches


class ShardedTeacher:
    """Owns the fp32 average of `model.tracked()` under `engine`.

    Raises RuntimeError if a parameter's fp32 master cannot be found: a teacher that silently stands still is the worst
    of failures.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, model: Data2Vec) -> None:
        self.masters: list[Tensor] = []  # the student's, fp32
        self.averages: list[Tensor] = []  # the teacher's, fp32, same shapes
        self._publish: list[tuple[Tensor, Tensor, dist.ProcessGroup | None]] = []  # (target, average or shard, group)
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
            torch._foreach_lerp_(self.averages, self.masters, 1 - decay)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Makes the forward pass see the averages."""
        for target, average, group in self._publish:
            if group is None:
                target.copy_(average)
                continue
            shard = target.view(dist.get_world_size(group), -1)[dist.get_rank(group)]
            if shard.data_ptr() != average.data_ptr():
                shard.copy_(average)
            if dist.get_world_size(group) > 1:
                dist.all_gather_into_tensor(target, shard, group=group)

    def _adopt(self, master: Tensor, average: Tensor) -> None:
        self.masters.append(master.data)
        self.averages.append(average)
        self._average_of[id(master)] = average

    def _adopt_parameters(self, engine: deepspeed.DeepSpeedEngine, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Stage 0: masters are whole, on every rank. In fp32 the teacher's parameters are the averages themselves."""
        master_of = {id(student): master for student, master in masters(engine)}
        for student, teacher in pairs:
            average = teacher.data.float()  # itself if it is fp32 already
            self._adopt(master_of[id(student)], average)
            if teacher.dtype != torch.float32:
                self._publish.append((teacher.data, average, None))

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
            average = shard if (shard.dtype, shard.device) == (master.dtype, master.device) else shard.to(master)
            self._adopt(master, average)
            self._publish.append((buffer, average, process_group))
        if teacher_of:
            raise RuntimeError(f"ZeRO's groups lack {len(teacher_of)} of {len(pairs)} parameters to average")

    def _adopt_partitions(self, optimizer: Any, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Stage 3: the optimizer keeps the fp32 masters of this rank's partitions one after the other, a flat buffer a
        sub-group; averages are laid out in the same way, and in fp32 the teacher's partitions are views of them."""
        for student, teacher in pairs:
            group, offset, count = optimizer.grad_position[optimizer.get_param_id(student)]
            master = optimizer.fp32_partitioned_groups_flat[group]
            if id(master) not in self._average_of:
                self._adopt(master, torch.zeros_like(master.data))
            teacher.ds_persist = False  # what is small enough would stay gathered and never see an update
            teacher.partition()
            partition = teacher.ds_tensor
            if partition.numel() != count:
                raise RuntimeError(f"a partition of {partition.numel()} values is averaged from one of {count}")
            average = self._average_of[id(master)][offset : offset + count]
            average.copy_(partition)
            if (partition.dtype, partition.device) == (average.dtype, average.device):
                partition.data = average
            else:
                self._publish.append((partition.data, average, None))
        optimizer.persistent_parameters[:] = [p for p in optimizer.persistent_parameters if p.ds_persist]
