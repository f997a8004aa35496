"""How batches come from a loader's workers: in shared memory that is used again.

PyTorch makes a piece of shared memory for every tensor of every batch, and passes it over a socket of its own: the
kernel clears its pages, maps them in two processes and throws them away. Here a worker keeps a few pieces, packs a
whole batch into a free one, and sends where in it the tensors lie. A piece is free again when nothing in the receiving
process refers to it any more.
"""

from __future__ import annotations

import io
import os
import pickle
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LINE = 64  # bytes: tensors begin at multiples of it, the first behind the mark
_FREE, _USED = 0, 1  # the mark, a piece's first byte: the worker sets it, the receiver takes it back
_received: dict[tuple[str, int, int], NDArray[np.uint8]] = {}


class _Place(NamedTuple):
    """A tensor's place in a piece: its bytes are [start, stop)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class _Pickler(pickle.Pickler):
    """Puts tensors aside, and their numbers where they were."""

    tensors: list[Tensor]

    def persistent_id(self, found: Any) -> int | None:
        if not isinstance(found, Tensor):
            return None
        self.tensors.append(found)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    tensors: list[Tensor]

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


@dataclass(frozen=True)
class Parcel:
    """A batch on its way: `content` is all of it but the tensors, which lie at `places` of a piece of shared memory."""

    content: bytes
    places: list[_Place]
    key: tuple[str, int, int]
    """The piece: loader, worker's process, number."""
    piece: Tensor | None
    """uint8 (bytes,); None if the receiver has it already."""

    def open(self) -> Any:
        """The batch. Each of its tensors keeps all of it, and the piece from being used again, for as long as it is
        there."""
        view = self._memory()[:]  # what the finaliser waits for has to be this parcel's own
        flat = torch.frombuffer(view, dtype=torch.uint8)
        weakref.finalize(view, _release, self._memory(), os.getpid()).atexit = False
        return self._unpack(flat)

    def pin_memory(self) -> Any:
        """The batch in one piece of pinned memory. DataLoader calls this by name."""
        memory = self._memory()
        flat = torch.from_numpy(memory[: self.places[-1].stop if self.places else 0]).pin_memory()
        _release(memory, os.getpid())
        return self._unpack(flat)

    def _memory(self) -> NDArray[np.uint8]:
        if self.piece is not None:
            _received[self.key] = self.piece.numpy()
            object.__setattr__(self, "piece", None)
        return _received[self.key]

    def _unpack(self, flat: Tensor) -> Any:
        unpickler = _Unpickler(io.BytesIO(self.content))
        # Parts of one storage: the allocator of pinned memory looks at it for copies that are under way.
        unpickler.tensors = [flat[p.start : p.stop].view(p.dtype).view(p.shape) for p in self.places]
        return unpickler.load()


def _release(memory: NDArray[np.uint8], process: int) -> None:
    if os.getpid() == process:  # not one forked from it, which inherits batches in use
        memory[0] = _FREE


def forget(loader: str) -> None:
    """Let go of the pieces of a loader whose workers have ended; tensors in them stay what they are."""
    for key in list(_received):  # in one go: another loader's thread may add to it
        if key[0] == loader:
            _received.pop(key, None)


class Packing:
    """What `collate` makes of samples as a `Parcel`, for a loader's workers."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any], loader: str) -> None:
        self.collate, self.loader = collate, loader
        self._pieces: list[Tensor] = []

    def __call__(self, samples: Sequence[Any]) -> Parcel:
        stream = io.BytesIO()
        pickler = _Pickler(stream, protocol=5)
        pickler.tensors = []
        pickler.dump(self.collate(samples))
        places, end = [], _LINE
        for tensor in pickler.tensors:
            places.append(_Place(tensor.dtype, tuple(tensor.shape), end, end + tensor.nbytes))
            end += -(-tensor.nbytes // _LINE) * _LINE
        number, fresh = self._free_piece(end)
        piece = self._pieces[number]
        piece[0] = _USED
        for tensor, place in zip(pickler.tensors, places, strict=True):
            piece[place.start : place.stop].view(place.dtype).view(place.shape).copy_(tensor)
        key = self.loader, os.getpid(), number
        return Parcel(stream.getvalue(), places, key, piece if fresh else None)

    def _free_piece(self, least: int) -> tuple[int, bool]:
        """The number of a free piece of at least so many bytes, and whether it is new."""
        free = [number for number, piece in enumerate(self._pieces) if piece[0] == _FREE]
        for number in free:
            if len(self._pieces[number]) >= least:
                return number, False
        piece = torch.zeros(least, dtype=torch.uint8).share_memory_()
        if free:
            self._pieces[free[0]] = piece
            return free[0], True
        self._pieces.append(piece)
        return len(self._pieces) - 1, True
