"""The fp32 state of a run as pieces: runs of consecutive elements of a parameter, or of a tensor-parallel slice of it.

Every rank writes the pieces that it owns. They say themselves where they belong, so that any other layout, more ranks
or fewer, sharded or split otherwise or not at all, reads of the files what overlaps its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.split import Split, split_of

MASTER, MOMENTS, TEACHER = "master", ("exp_avg", "exp_avg_sq"), "teacher"


class Piece(NamedTuple):
    """Elements [start, start + values.numel()) of what is called `name` and, here, has a `shape`; `values` is a 1-D
    view of the state itself. `split`: which slice of the whole is here."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    split: Split | None = None

    def share(self, rank: int, ranks: int) -> Piece:
        """The part of it that `rank` of `ranks` writes where all hold the same."""
        first, last = (self.values.numel() * r // ranks for r in (rank, rank + 1))
        return self._replace(start=self.start + first, values=self.values[first:last])


class Stretch(NamedTuple):
    """Elements [start, start + size) of parameter `name` of a `shape` lie at `offset` of `tensor`, for which the
    optimizer has moments: the fp32 master of a parameter (stage 0) or of many, one after the other (stages 1 to 3)."""

    name: str
    shape: tuple[int, ...]
    start: int
    size: int
    tensor: Tensor
    offset: int
    split: Split | None = None

    def of(self, flat: Tensor, name: str) -> Piece:
        """Its elements of a tensor laid out as `tensor` is, under another name."""
        values = flat.detach().view(-1)[self.offset : self.offset + self.size]
        return Piece(name, self.shape, self.start, values, self.split)


def stretches(engine: deepspeed.DeepSpeedEngine) -> Iterator[Stretch]:
    """What this rank owns of all trained parameters: everything at stage 0, its shards above."""
    names = {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        found = _partitions(optimizer, names)
    elif stage:
        found = _flat_groups(optimizer, names)
    else:
        found = (Stretch(names[id(p)], tuple(p.shape), 0, p.numel(), master, 0) for p, master in masters(engine))
    if engine.mpu is None:
        return found
    rank, ranks = engine.mpu.get_model_parallel_rank(), engine.mpu.get_model_parallel_world_size()
    return (stretch._replace(split=split_of(stretch.name, rank, ranks)) for stretch in found)


def masters(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[Tensor, Tensor]]:
    """Stage 0: (parameter, its fp32 master, which is itself but for fp16)."""
    optimizer = engine.optimizer
    low: dict[int, Tensor] = {}
    if hasattr(optimizer, "fp32_groups"):  # fp16: the wrapper keeps masters in the order of its groups
        for parameters, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            low |= {id(p): master for p, master in zip(parameters, full, strict=True)}
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            master = parameter if parameter.dtype == torch.float32 else low.get(id(parameter))
            if master is None:
                raise RuntimeError(f"no fp32 master found for a parameter of shape {tuple(parameter.shape)}")
            yield parameter, master


def _flat_groups(optimizer: Any, names: Mapping[int, str]) -> Iterator[Stretch]:
    """Stages 1 and 2: a flat low-precision buffer a group, cut into equal shards, and the master of the rank's own."""
    for index, group in enumerate(optimizer.bit16_groups):
        flat, master = optimizer.bit16_groups_flat[index], optimizer.single_partition_of_fp32_groups[index]
        low = dist.get_rank(optimizer.real_dp_process_group[index]) * master.numel()
        for parameter in group:
            begin = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            if not 0 <= begin <= flat.numel() - parameter.numel():
                raise RuntimeError(f"{names[id(parameter)]} does not lie in its ZeRO group's buffer")
            first, last = max(begin, low), min(begin + parameter.numel(), low + master.numel())
            if first < last:
                shape = tuple(parameter.shape)
                yield Stretch(names[id(parameter)], shape, first - begin, last - first, master, first - low)


def _partitions(optimizer: Any, names: Mapping[int, str]) -> Iterator[Stretch]:
    """Stage 3: a partition of every parameter, those of a sub-group one after the other; the last rank's are padded."""
    for parameter in (p for group in optimizer.fp16_groups for p in group):
        group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = dist.get_rank(parameter.ds_process_group) * count
        own = min(count, parameter.ds_numel - start)
        if own > 0:
            master, shape = optimizer.fp32_partitioned_groups_flat[group], tuple(parameter.ds_shape)
            yield Stretch(names[id(parameter)], shape, start, own, master, offset)


def optimizer_pieces(engine: deepspeed.DeepSpeedEngine) -> Iterator[Piece]:
    """Masters and Adam's moments of what this rank owns; moments that do not exist yet are made, and are zero."""
    state = engine.basic_optimizer.state
    for stretch in stretches(engine):
        moments = state[stretch.tensor]
        for kind in MOMENTS:
            if kind not in moments:
                moments[kind] = torch.zeros_like(stretch.tensor.detach())
        yield stretch.of(stretch.tensor, f"{MASTER}/{stretch.name}")
        for kind in MOMENTS:
            yield stretch.of(moments[kind], f"{kind}/{stretch.name}")


def fill(pieces: Iterable[Piece], tensors: Mapping[str, Tensor]) -> None:
    """Gives pieces their values out of whole tensors, by name."""
    for piece in pieces:
        whole = tensors[piece.name]
        own = piece.split.take(whole) if piece.split else whole
        piece.values.copy_(own.flatten()[piece.start : piece.start + piece.values.numel()])


def master_pieces(engine: deepspeed.DeepSpeedEngine) -> Iterator[Piece]:
    """Masters of what this rank owns."""
    return (stretch.of(stretch.tensor, f"{MASTER}/{stretch.name}") for stretch in stretches(engine))


def set_steps(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    """How many steps Adam's moments are an average over."""
    for tensor in {id(s.tensor): s.tensor for s in stretches(engine)}.values():
        engine.basic_optimizer.state[tensor]["step"] = torch.tensor(float(steps), device=tensor.device)


def publish_masters(engine: deepspeed.DeepSpeedEngine) -> None:
    """Makes the forward pass see the masters. Collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()
    else:
        for parameter, master in masters(engine):
            if parameter is not master:
                parameter.data.copy_(master)


def write(path: Path, pieces: Iterable[Piece]) -> None:
    """One tensor a piece; where it starts, and the shape of the whole, are metadata."""
    found = {piece.name: piece for piece in pieces}
    tensors = {name: piece.values.contiguous() for name, piece in found.items()}
    places = {name: json.dumps([piece.start, piece.shape, piece.split]) for name, piece in found.items()}
    save_file(tensors, path, metadata=places)
    path.chmod(0o644)  # for a group's colleagues: it is made readable for its owner alone


class Stored(NamedTuple):
    """A piece in a file."""

    start: int
    size: int
    shape: tuple[int, ...]
    split: Split | None
    values: Any  # safetensors' slice, which reads what is asked of it


def read(paths: Sequence[Path], wanted: Iterable[Piece]) -> None:
    """Fills the `wanted` pieces from files of any layout. Raises RuntimeError if they leave a hole or do not fit."""
    with ExitStack() as stack:
        index: dict[str, list[Stored]] = {}
        for path in paths:
            file = stack.enter_context(safe_open(path, "pt"))
            for name, place in (file.metadata() or {}).items():
                start, shape, split = json.loads(place)
                values = file.get_slice(name)
                stored = Stored(start, values.get_shape()[0], tuple(shape), split and Split(*split), values)
                index.setdefault(name, []).append(stored)
        for piece in wanted:
            found = index.get(piece.name, [])
            alike = [stored for stored in found if stored.split == piece.split]
            if alike or not found:
                _fill(piece, alike)
                continue
            slices = [_slice(piece.name, [s for s in found if s.split == split]) for split in _splits(found)]
            tensor = found[0].split.join(slices) if found[0].split else slices[0]
            own = piece.split.take(tensor) if piece.split else tensor
            _fill(piece, [Stored(0, own.numel(), tuple(own.shape), piece.split, own.flatten())])


def _splits(found: Sequence[Stored]) -> list[Split | None]:
    """The slices of a whole, in order."""
    first = found[0].split
    return [first._replace(rank=rank) for rank in range(first.ranks)] if first else [None]


def _slice(name: str, found: Sequence[Stored]) -> Tensor:
    """All of a parameter, or of one slice of it."""
    if not found:
        raise RuntimeError(f"a slice of {name} is not there")
    out = torch.empty(found[0].shape)
    _fill(Piece(name, found[0].shape, 0, out.view(-1)), found)
    return out


def _fill(piece: Piece, found: Sequence[Stored]) -> None:
    """Copies what overlaps."""
    filled, end = 0, piece.start + piece.values.numel()
    for stored in found:
        if stored.shape != tuple(piece.shape):
            raise RuntimeError(f"{piece.name} has shape {list(stored.shape)} there and {list(piece.shape)} here")
        first, last = max(piece.start, stored.start), min(end, stored.start + stored.size)
        if first < last:
            values = stored.values[first - stored.start : last - stored.start]
            piece.values[first - piece.start : last - piece.start].copy_(values)
            filled += last - first
    if filled != piece.values.numel():
        raise RuntimeError(f"{filled} of {piece.values.numel()} values of {piece.name} are there")


def whole_shapes(folder: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """The whole parameters that the files of a folder have pieces of, by name, in their order."""
    found: dict[str, tuple[int, ...]] = {}
    for path in files(folder):
        with safe_open(path, "pt") as file:
            for key, place in (file.metadata() or {}).items():
                of_kind, _, name = key.partition("/")
                if of_kind == kind:
                    _, shape, split = json.loads(place)
                    found[name] = Split(*split).whole(shape) if split else tuple(shape)
    return found


def read_whole(folder: Path, kind: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Whole parameters of a `kind`, fp32 on the CPU. Raises RuntimeError if a part is missing."""
    out = {name: torch.empty(tuple(shape)) for name, shape in shapes.items()}
    read(
        files(folder),
        [Piece(f"{kind}/{name}", tuple(tensor.shape), 0, tensor.view(-1)) for name, tensor in out.items()],
    )
    return out


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard_*.safetensors"))


def file(folder: Path, rank: int) -> Path:
    return folder / f"shard_{rank:05d}.safetensors"
