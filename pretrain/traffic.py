"""Bytes that one rank sends over the wire for one optimizer step, and in how many collectives, computed.

The convention is a ring's: of an all-reduce over n ranks each sends 2 (n - 1) / n of the payload, of an all-gather or a
reduce-scatter (n - 1) / n of what is whole. Sums of a few numbers (norms, counts, overflow flags) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from models.config import ModelConfig
from pretrain.config import BatchPlan, Config
from pretrain.layout import Group, Zero, groups
from pretrain.plan import element_size, gathered_at_stage3, samples, visible_tokens


class Sent(NamedTuple):
    """`bytes` in `calls` collectives."""

    bytes: float
    calls: int


@dataclass(frozen=True)
class Traffic:
    """What is sent over data-parallel peers (the first four) and over tensor-parallel ones.

    `gathering`: stage 3's, of student, decoder and teacher, before they compute; `weights`: what the optimizer's step
    gathers of updated ones; `teacher`: its new averages.
    """

    gradients: Sent
    gathering: Sent
    weights: Sent
    teacher: Sent
    tensor_parallel: Sent

    @property
    def data_parallel(self) -> Sent:
        kinds = (self.gradients, self.gathering, self.weights, self.teacher)
        return Sent(sum(kind.bytes for kind in kinds), sum(kind.calls for kind in kinds))

    @property
    def total(self) -> float:
        return self.data_parallel.bytes + self.tensor_parallel.bytes


NOTHING = Sent(0, 0)


def traffic(config: Config, plan: BatchPlan, zero: Zero) -> Traffic:
    """What a rank of `plan` sends. DeepSpeed reduces at stages 0 to 2 by all-reduce; at stages 2 and 3 each micro-step
    reduces its own gradients."""
    layout, ranks = groups(config), plan.ranks
    low, share = element_size(config.train.precision, zero.stage), (ranks - 1) / ranks
    split = tensor_parallel_traffic(config, plan)
    if ranks == 1:
        return Traffic(NOTHING, NOTHING, NOTHING, NOTHING, split)
    trained = sum(group.total for group in layout)
    reductions = plan.accumulation if zero.stage >= 2 else 1
    buckets = reductions * -(-trained // zero.reduce_bucket)
    if zero.stage == 3:
        partitions = ranks * sum(group.partition(ranks) for group in layout)
        return Traffic(
            Sent(share * reductions * low * partitions, buckets),
            gathering(config, layout, plan, zero),
            Sent(share * low * gathered_at_stage3(layout, zero, ranks)[0], 1),
            NOTHING,  # every rank averages the partitions that it has, and gathers them when the teacher computes
            split,
        )
    gradients = Sent(2 * share * reductions * low * trained, buckets)
    if zero.stage == 0:
        return Traffic(gradients, NOTHING, NOTHING, NOTHING, split)
    flat = [(group.flat(ranks), group.tracked) for group in layout]
    return Traffic(
        gradients,
        NOTHING,
        Sent(share * low * sum(size for size, _ in flat), len(flat)),
        Sent(share * low * sum(size for size, tracked in flat if tracked), sum(tracked for _, tracked in flat)),
        split,
    )


def gathering(config: Config, layout: tuple[Group, ...], plan: BatchPlan, zero: Zero) -> Sent:
    """Stage 3: every micro-step gathers the teacher, the student and the decoder, but for what stays gathered, and for
    the backward pass again what it needs only beyond the reuse distance."""
    low, ranks = element_size(config.train.precision, zero.stage), plan.ranks
    small, _ = gathered_at_stage3(layout, zero, ranks)
    trained = sum(group.total for group in layout) - small
    again = max(0, trained - zero.reuse // 2)
    teacher = sum(group.total for group in layout if group.tracked)
    elements = trained + again + teacher
    bucket = max(zero.prefetch, *(max(group.sizes) for group in layout))  # fetched ahead
    return Sent((ranks - 1) / ranks * low * elements * plan.accumulation, -(-elements // bucket) * plan.accumulation)


def tensor_parallel_traffic(config: Config, plan: BatchPlan) -> Sent:
    """Activations, in the precision that is computed in: a block's two row-parallel layers add up their outputs, in
    the backward pass the two column-parallel ones the gradients of their inputs. The teacher goes forward only."""
    ranks = config.train.tensor_parallel
    if ranks == 1:
        return NOTHING
    blocks = list(_tokens(config.model))
    each = samples(config.model, plan.micro_batch) * config.model.width * (4 if config.train.precision == "fp32" else 2)
    payload = sum(rounds * tokens for tokens, rounds in blocks) * each
    calls = sum(rounds for _, rounds in blocks)
    return Sent(2 * (ranks - 1) / ranks * payload * plan.accumulation, calls * plan.accumulation)


def _tokens(model: ModelConfig) -> Iterator[tuple[int, int]]:
    """(tokens of one sample, all-reduces of them) of every block of the student and of the teacher."""
    for _ in range(model.prenet_depth + model.depth):
        yield model.num_masks * visible_tokens(model), 4
        yield model.positions + model.extra_tokens, 2
