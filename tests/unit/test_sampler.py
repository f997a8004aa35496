"""The stream of samples: the same whoever reads it, and every epoch a permutation."""

from itertools import chain, islice

import numpy as np
import pytest

from pretrain.config import BatchPlan
from pretrain.data.sampler import StreamSampler

LENGTH, GLOBAL = 50, 16  # an epoch ends within a batch
PLANS = [BatchPlan(1, 16, 1), BatchPlan(1, 2, 8), BatchPlan(2, 8, 1), BatchPlan(4, 2, 2), BatchPlan(16, 1, 1)]


def joined(lists):
    return list(chain.from_iterable(lists))


def global_batches(plan, count, first=0, seed=1, length=LENGTH):
    """The samples of `count` global batches over all ranks, rank by rank."""
    ranks = []
    for rank in range(plan.ranks):
        stream = iter(StreamSampler(length, plan, rank, seed, first))
        micro = list(islice(stream, count * plan.accumulation))
        assert {len(keys) for keys in micro} == {plan.micro_batch}
        a = plan.accumulation
        ranks.append([joined(micro[g * a : (g + 1) * a]) for g in range(count)])
    return [joined(rank[g] for rank in ranks) for g in range(count)]


def test_each_epoch_is_a_permutation_and_another_one():
    stream = joined(global_batches(PLANS[0], 25))  # 400 samples: 8 epochs
    orders = [[index for _, index in stream[e * LENGTH : (e + 1) * LENGTH]] for e in range(8)]
    assert [epoch for epoch, _ in stream] == np.repeat(np.arange(8), LENGTH).tolist()
    assert all(sorted(order) == list(range(LENGTH)) for order in orders)
    assert len({tuple(order) for order in orders}) == 8
    assert list(range(LENGTH)) not in orders


@pytest.mark.parametrize("plan", PLANS[1:], ids=str)
def test_global_batches_do_not_depend_on_ranks_or_accumulation(plan):
    assert global_batches(plan, 10) == global_batches(PLANS[0], 10)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("first", [1, 3, 7])
def test_starting_late_equals_skipping(plan, first):
    assert global_batches(plan, 5, first) == global_batches(plan, 5 + first)[first:]


def test_a_batch_may_cross_an_epoch():
    batch = global_batches(PLANS[3], 4)[3]  # positions 48 to 63
    assert [epoch for epoch, _ in batch] == [0] * 2 + [1] * 14


def test_a_data_set_may_be_smaller_than_a_batch():
    batch = global_batches(PLANS[2], 1, length=5)[0]
    assert [epoch for epoch, _ in batch] == [0] * 5 + [1] * 5 + [2] * 5 + [3]
    assert sorted(index for epoch, index in batch if epoch == 1) == [0, 1, 2, 3, 4]


def test_the_order_follows_the_seed():
    assert global_batches(PLANS[0], 3, seed=1) == global_batches(PLANS[0], 3, seed=1)
    assert global_batches(PLANS[0], 3, seed=1) != global_batches(PLANS[0], 3, seed=2)


def test_keys_are_plain_integers():
    """They go through a loader's queue, and into file names and messages."""
    assert {type(v) for key in global_batches(PLANS[0], 1)[0] for v in key} == {int}


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StreamSampler(0, PLANS[0], 0, 1)
