"""Counts what every collective of torch.distributed moves, whoever calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import ProcessGroup

# What c10d calls for each collective: (position of the tensors that hold the whole payload, how often a ring algorithm
# sends each byte of it, but for the factor (n - 1) / n).
COLLECTIVES = {
    "allreduce": (0, 2),
    "allreduce_coalesced": (0, 2),
    "all_gather_single": (0, 1),
    "all_gather_single_coalesced": (0, 1),
    "_allgather_base": (0, 1),
    "allgather": (0, 1),
    "allgather_coalesced": (0, 1),
    "allgather_into_tensor_coalesced": (0, 1),
    "reduce_scatter_single": (1, 1),
    "reduce_scatter_single_coalesced": (1, 1),
    "_reduce_scatter_base": (1, 1),
    "reduce_scatter": (1, 1),
    "reduce_scatter_tensor_coalesced": (1, 1),
    "broadcast": (0, 1),
    "reduce": (0, 1),
    "all_to_all_single": (1, 1),
    "alltoall_base": (1, 1),
    "alltoall": (1, 1),
}


def payload(argument: Any) -> int:
    """Bytes of a tensor, or of all in nested lists of them."""
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(payload, argument))


class Collectives:
    """Bytes by (phase, collective, name of the process group), as one rank of a ring sends them."""

    def __init__(self) -> None:
        self.phase = "other"
        self.bytes: Counter[tuple[str, str, str]] = Counter()

    def during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with what it moves booked on `phase`."""

        def booked(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before

        return booked

    def counted(self, name: str) -> Callable[..., Any]:
        original, (position, rounds) = getattr(ProcessGroup, name), COLLECTIVES[name]

        def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            ranks = group.size()
            if ranks > 1:
                key = (self.phase, name, group.group_name)
                self.bytes[key] += rounds * payload(args[position]) * (ranks - 1) // ranks
            return original(group, *args, **kwargs)

        return call


@contextmanager
def counting() -> Iterator[Collectives]:
    """Counts the collectives that are called inside."""
    collectives = Collectives()
    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(patch.object(ProcessGroup, name, collectives.counted(name)))
        yield collectives
