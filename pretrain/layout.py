"""How parameters lie on the ranks: tensor-parallel shares, ZeRO's flat buffers, partitions and reduce buckets.

Counts of elements only, of a model on the meta device, as DeepSpeed 0.19 lays parameters out.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from models.config import ModelConfig
from models.data2vec import Data2Vec
from models.split import split_of
from pretrain.config import Config, OptimConfig
from pretrain.eager import shapes_only
from pretrain.optim import parameter_groups


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed JSON decides of memory and traffic; sizes count elements."""

    stage: int
    offload: bool = False  # optimizer, masters and the teacher's averages lie in the host's memory
    reduce_bucket: int = 500_000_000
    buckets: int = 1  # two where reduction overlaps the backward pass
    persistence: int = 100_000  # stage 3 keeps smaller parameters gathered
    reuse: int = 1_000_000_000  # and those that come again within so many elements
    prefetch: int = 50_000_000
    sub_group: int = 1_000_000_000

    @classmethod
    def of(cls, mechanics: Mapping[str, Any]) -> Zero:
        """Reads what `pretrain.engine.read_mechanics` returns."""
        section = mechanics.get("zero_optimization", {})
        stage = section.get("stage", 0)

        def number(key: str, default: int) -> int:
            return int(section.get(f"stage3_{key}", section.get(key, default)))

        return cls(
            stage,
            "offload_optimizer" in section,
            number("reduce_bucket_size", cls.reduce_bucket),
            2 if stage in (1, 2) and section.get("overlap_comm") else 1,
            number("param_persistence_threshold", cls.persistence),
            number("max_reuse_distance", cls.reuse),
            number("prefetch_bucket_size", cls.prefetch),
            number("sub_group_size", cls.sub_group),
        )


@dataclass(frozen=True)
class Group:
    """The parameters of one of the optimizer's groups, as one tensor-parallel rank holds them."""

    sizes: tuple[int, ...]  # elements of each, in the optimizer's order
    tracked: bool  # the teacher averages them

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def flat(self, ranks: int) -> int:
        """Stages 1 and 2: the flat buffer, padded so that `ranks` shards are equal and even."""
        return -(-self.total // (2 * ranks)) * 2 * ranks

    def partition(self, ranks: int) -> int:
        """Stage 3: a rank's partitions, each parameter's rounded up."""
        return sum(-(-size // ranks) for size in self.sizes)

    @cached_property
    def ends(self) -> list[int]:
        """Where parameters begin and end in the flat buffer."""
        return list(accumulate(self.sizes, initial=0))

    def touched(self, ranks: int, rank: int) -> int:
        """Stages 1 and 2: all elements of the parameters of which the shard of `rank` holds at least one."""
        ends = self.ends
        shard = self.flat(ranks) // ranks
        first = bisect_right(ends, rank * shard) - 1
        last = bisect_left(ends, min((rank + 1) * shard, self.total))
        return ends[max(first, last)] - ends[first]


def groups(config: Config) -> tuple[Group, ...]:
    """The optimizer's groups. What is tracked is at the same time the teacher, which has the same shapes."""
    ranks = config.train.tensor_parallel
    return tuple(
        Group(tuple(size // ranks if split_of(name, 0, ranks) else size for name, size in parameters), tracked)
        for parameters, tracked in _groups(config.model, config.optim)
    )


@lru_cache(maxsize=8)
def _groups(model: ModelConfig, optim: OptimConfig) -> list[tuple[list[tuple[str, int]], bool]]:
    with shapes_only():
        net = Data2Vec(model)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return [
        ([(names[id(p)], p.numel()) for p in group["params"]], group["tracked"])
        for group in parameter_groups(net, optim)
    ]
