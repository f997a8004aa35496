"""The teacher's weights: an exponential moving average in fp32, sharded as the optimizer shards its fp32 masters.

Each rank averages the shard of the student's masters that it owns, without communication. What the forward pass reads,
the low-precision teacher parameters, follows from the shards: copied at stage 0, gathered once per flat buffer at
stages 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.data2vec import Data2Vec


@dataclass(frozen=True)
class Piece:
    """The part of one teacher parameter that this rank owns: elements [start, start + average.numel()) of it."""

    name: str
    start: int
    average: Tensor  # 1-D fp32 view


class ShardedTeacher:
    """Owns the fp32 average of `model.tracked()` under `engine`.

    Raises RuntimeError if a parameter's fp32 master cannot be found: a teacher that silently stands still is the worst
    of failures.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, model: Data2Vec) -> None:
        self.masters: list[Tensor] = []  # the student's, fp32
        self.averages: list[Tensor] = []  # the teacher's, fp32, same shapes
        self.pieces: list[Piece] = []
        self._publish: list[tuple[Tensor, Tensor, dist.ProcessGroup | None]] = []  # (target, average or shard, group)
        self._names = {id(p): name.removeprefix("teacher.") for name, p in model.named_parameters()}
        pairs = list(model.tracked())
        with torch.no_grad():
            if engine.zero_optimization_stage() in (1, 2):
                self._adopt_flat_groups(engine.optimizer, pairs)
            else:
                self._adopt_parameters(engine, pairs)

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

    def save(self, path: Path) -> None:
        """Writes this rank's pieces: one tensor a parameter, its first element's position as metadata."""
        tensors = {piece.name: piece.average for piece in self.pieces}
        save_file(tensors, path, metadata={piece.name: str(piece.start) for piece in self.pieces})

    def load(self, paths: list[Path]) -> None:
        """Reads the pieces of any number of ranks. Raises RuntimeError if they leave a hole."""
        filled = dict.fromkeys((piece.name for piece in self.pieces), 0)
        for path in paths:
            with safe_open(path, "pt") as file:
                starts = file.metadata() or {}
                for piece in self.pieces:
                    if piece.name in starts:
                        filled[piece.name] += _copy_overlap(piece, file.get_tensor(piece.name), int(starts[piece.name]))
        for piece in self.pieces:
            if filled[piece.name] != piece.average.numel():
                raise RuntimeError(
                    f"the checkpoint holds {filled[piece.name]} of {piece.average.numel()} values of "
                    f"the teacher's {piece.name}"
                )
        self.publish()

    def _adopt_parameters(self, engine: deepspeed.DeepSpeedEngine, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Stage 0: masters are whole, on every rank. In fp32 the teacher's parameters are the averages themselves."""
        master_of: dict[int, Tensor] = {}
        if hasattr(engine.optimizer, "fp32_groups"):  # fp16: the wrapper keeps masters in the order of its groups
            for low, full in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
                master_of |= {id(p): master for p, master in zip(low, full, strict=True)}
        for student, teacher in pairs:
            master = student if student.dtype == torch.float32 else master_of.get(id(student))
            if master is None:
                raise RuntimeError(f"no fp32 master found for {self._names[id(student)]}")
            average = teacher.data.float()  # itself if it is fp32 already
            self.masters.append(master.data)
            self.averages.append(average)
            if teacher.dtype != torch.float32:
                self._publish.append((teacher.data, average, None))
            self.pieces.append(Piece(self._names[id(teacher)], 0, average.view(-1)))

    def _adopt_flat_groups(self, optimizer: object, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Stages 1 and 2: the optimizer keeps a flat low-precision buffer a group, cut into equal shards, and the fp32
        master of its own shard. The teacher's parameters move into buffers laid out in just the same way."""
        teacher_of = {id(student): teacher for student, teacher in pairs}
        adopted = 0
        for index, group in enumerate(optimizer.bit16_groups):  # type: ignore[attr-defined]
            if not any(id(p) in teacher_of for p in group):
                continue
            flat = optimizer.bit16_groups_flat[index]  # type: ignore[attr-defined]
            master = optimizer.single_partition_of_fp32_groups[index]  # type: ignore[attr-defined]
            process_group = optimizer.real_dp_process_group[index]  # type: ignore[attr-defined]
            buffer = torch.zeros_like(flat)
            slots = []
            for student in group:
                teacher = teacher_of[id(student)]
                start = (student.data_ptr() - flat.data_ptr()) // flat.element_size()
                if not 0 <= start <= flat.numel() - student.numel():
                    raise RuntimeError(f"{self._names[id(student)]} does not lie in its ZeRO group's buffer")
                slot = buffer[start : start + student.numel()].view_as(student)
                slot.copy_(teacher)
                teacher.data = slot
                slots.append((self._names[id(teacher)], start, start + student.numel()))
                adopted += 1
            low = dist.get_rank(process_group) * master.numel()
            shard = buffer[low : low + master.numel()]
            average = shard if shard.dtype == torch.float32 else shard.float()
            self.masters.append(master.data)
            self.averages.append(average)
            self._publish.append((buffer, average, process_group))
            self.pieces += _pieces(slots, low, average)
        if adopted != len(pairs):
            raise RuntimeError(f"ZeRO's groups hold {adopted} of the {len(pairs)} parameters that the teacher averages")


def _pieces(slots: list[tuple[str, int, int]], low: int, average: Tensor) -> Iterator[Piece]:
    """The parts of a buffer's slots (name, from, to) that fall into the shard starting at `low`."""
    for name, begin, end in slots:
        first, last = max(begin, low), min(end, low + average.numel())
        if first < last:
            yield Piece(name, first - begin, average[first - low : last - low])


def _copy_overlap(piece: Piece, values: Tensor, start: int) -> int:
    """Copies what `values`, beginning at element `start` of the parameter, has in common with the piece."""
    values = values.view(-1)
    first = max(piece.start, start)
    last = min(piece.start + piece.average.numel(), start + values.numel())
    if first >= last:
        return 0
    piece.average[first - piece.start : last - piece.start].copy_(values[first - start : last - start])
    return last - first
