"""Which part of every parameter a rank has under tensor parallelism (Shoeybi et al. 2019): the heads and the hidden
units of all blocks are split; norms, embeddings, convolutions and the decoder are whole on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.baselines.config import DATA2VEC2
from models.config import ModelConfig


class Split(NamedTuple):
    """A slice of a whole tensor: along `dim`, where `parts` equal parts lie one after the other (q, k and v: 3), the
    `rank`-th of `ranks` slices of each part."""

    dim: int
    parts: int
    rank: int
    ranks: int

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor that slices of `shape` are of."""
        return tuple(n * self.ranks if i == self.dim else n for i, n in enumerate(shape))

    def take(self, tensor: Tensor) -> Tensor:
        """This rank's slice of a whole tensor, as a copy."""
        return torch.cat([part.chunk(self.ranks, self.dim)[self.rank] for part in self._parts(tensor)], self.dim)

    def join(self, slices: Sequence[Tensor]) -> Tensor:
        """The whole that the slices of all ranks, in their order, are of."""
        return torch.cat([s for part in zip(*map(self._parts, slices), strict=True) for s in part], self.dim)

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(self.parts, self.dim)


RULES = {  # ends of names: (dim, parts)
    "attn.qkv.weight": (0, 3),
    "attn.qkv.bias": (0, 3),
    "attn.proj.weight": (1, 1),
    "mlp.fc1.weight": (0, 1),
    "mlp.fc1.bias": (0, 1),
    "mlp.fc2.weight": (1, 1),
    "alibi.scale": (0, 1),
}


def split_of(name: str, rank: int, ranks: int) -> Split | None:
    """How `ranks` split the parameter of `Data2Vec` that has this name; None if each has the whole."""
    rule = next((rule for end, rule in RULES.items() if name.endswith(end)), None)
    return Split(*rule, rank, ranks) if rule and ranks > 1 else None


def split_problem(config: ModelConfig, ranks: int) -> str:
    """Why a model cannot be split over `ranks`, with the numbers of ranks that could; empty if it can."""
    if config.objective != DATA2VEC2 and ranks > 1:
        return f"train.tensor_parallel={ranks}: layers of model.objective={config.objective} are not split; set it to 1"
    hidden = int(config.width * config.mlp_ratio)
    fit = [n for n in range(1, config.heads + 1) if config.heads % n == 0 and hidden % n == 0]
    if ranks in fit:
        return ""
    return (
        f"train.tensor_parallel={ranks} must divide model.heads={config.heads} and the {hidden} hidden units of its "
        f"MLPs; {', '.join(map(str, fit))} would"
    )
