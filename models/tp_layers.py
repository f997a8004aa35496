"""The layers of a tensor-parallel model: megatron-core's column- and row-parallel ones, put in from outside, so that
one rank and many begin with the same weights. Importing this takes seconds, for megatron-core does."""

from __future__ import annotations

from typing import Any, cast

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from models.alibi import Alibi
from models.encoder import Attention, Mlp
from models.split import split_of


class Column(ColumnParallelLinear):
    """(..., I) whole -> (..., O / ranks): `linear`'s parameters, of which each rank has some output rows."""

    def __init__(self, linear: nn.Linear, group: ProcessGroup) -> None:
        size = linear.in_features, linear.out_features
        super().__init__(*size, config=config(group), init_method=as_given, gather_output=False, tp_group=group)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Row(RowParallelLinear):
    """(..., I / ranks) -> (..., O) whole: `linear`'s parameters, of which each rank has some input columns."""

    def __init__(self, linear: nn.Linear, group: ProcessGroup) -> None:
        size = linear.in_features, linear.out_features
        super().__init__(
            *size, config=config(group), init_method=as_given, bias=True, input_is_parallel=True, skip_bias_add=False,
            tp_group=group,
        )  # fmt: skip
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def config(group: ProcessGroup) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=group.size(), use_cpu_initialization=True, perform_initialization=False
    )


def as_given(weight: Tensor) -> None:
    """Nothing is drawn: parameters come from a whole model."""


def replace(module: nn.Module, layers: dict[str, type[Column | Row]], group: ProcessGroup) -> None:
    for name, layer in layers.items():
        setattr(module, name, layer(getattr(module, name), group))


def split_blocks(model: nn.Module, group: ProcessGroup) -> None:
    """Leaves of every block of `model`, whole and the same on all ranks of `group`, what this rank computes."""
    rank, ranks = group.rank(), group.size()
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.heads //= ranks
            module.stream = rank
            replace(module, {"qkv": Column, "proj": Row}, group)
        elif isinstance(module, Mlp):
            replace(module, {"fc1": Column, "fc2": Row}, group)
        elif isinstance(module, Alibi):
            module.slopes = module.slopes.chunk(ranks)[rank].clone()
    for name, parameter in model.named_parameters():
        if split := split_of(name, rank, ranks):
            parameter.data = split.take(parameter.data)
            cast(Any, parameter).tensor_model_parallel = True  # counted on each rank when norms are added up
