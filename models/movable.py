"""Batches that go to a device whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Movable:
    """A dataclass whose tensors move together."""

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def used_by(self, stream: torch.cuda.Stream) -> Self:
        """Itself, whose memory is not given away before what `stream` has been asked for by then is done."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)
        return self

    def pin_memory(self) -> Self:
        """DataLoader calls this by name; it does not look inside dataclasses."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed)
