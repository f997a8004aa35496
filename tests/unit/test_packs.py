"""The stream of packs: the same whoever reads it, every recording once an epoch, and little lost by cropping."""

from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest

from pretrain.config import BatchPlan
from pretrain.data.packs import PackSampler
from pretrain.settings import ConfigError

BOUND = 1_000_000
SPEECH = np.random.default_rng(0).gamma(6, 2.2 * 16_000, 3000).clip(32_000, 320_000).astype(np.int64)
FEW = np.random.default_rng(1).integers(32_000, 320_000, 60)
PLANS = [BatchPlan(1, BOUND, 6), BatchPlan(2, BOUND, 3), BatchPlan(3, BOUND, 2), BatchPlan(6, BOUND, 1)]


def joined(lists):
    return list(chain.from_iterable(lists))


def global_batches(plan, count, first=0, seed=1, lengths=FEW, **options):
    """The packs of `count` global batches over all ranks, rank by rank."""
    ranks = []
    for rank in range(plan.ranks):
        packs = list(islice(PackSampler(lengths, plan, rank, seed, first, **options), count * plan.accumulation))
        ranks.append([packs[g * plan.accumulation : (g + 1) * plan.accumulation] for g in range(count)])
    return [joined(rank[g] for rank in ranks) for g in range(count)]


def epochs(count, lengths, seed=1, bound=BOUND, **options):
    """The packs of the first epochs, told apart by their keys."""
    found = [[] for _ in range(count)]
    for pack in PackSampler(lengths, BatchPlan(1, bound, 1), 0, seed, **options):
        assert len({epoch for epoch, _, _ in pack}) == 1
        if pack[0][0] >= count:
            return found
        found[pack[0][0]].append(pack)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pool", [1, 7, 100, 4096])
@pytest.mark.parametrize(
    "lengths",
    [FEW, SPEECH, [BOUND], [BOUND, 1, BOUND], [5] * 9, [BOUND // 10] * 2 + [BOUND // 2] * 9, np.arange(1, 999)],
    ids=len,
)
def test_every_recording_once_an_epoch_and_the_bound_kept(lengths, pool, padded):
    for number, packs in enumerate(epochs(3, lengths, pool=pool, padded=padded)):
        keys = joined(packs)
        assert {epoch for epoch, _, _ in keys} == {number}
        assert sorted(index for _, index, _ in keys) == list(range(len(lengths)))
        for pack in packs:
            own = [lengths[index] for _, index, _ in pack]
            samples = [count for _, _, count in pack]
            assert samples == (own if padded else [min(own)] * len(own))
            assert len(pack) * max(samples) <= BOUND


@pytest.mark.parametrize("plan", PLANS[1:], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(plan, padded):
    expected = global_batches(PLANS[0], 12, padded=padded)
    assert global_batches(plan, 12, padded=padded) == expected
    assert max(epoch for epoch, _, _ in joined(expected[-1])) >= 3  # ends of epochs within


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("first", [1, 3, 10])
def test_starting_late_equals_skipping(plan, first):
    assert global_batches(plan, 5, first) == global_batches(plan, 5 + first)[first:]


def test_a_batch_may_be_larger_than_several_epochs():
    batch = global_batches(BatchPlan(4, 10, 2), 1, lengths=[5, 4, 9])[0]  # two packs an epoch
    assert [pack[0][0] for pack in batch] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_order_follows_seed_and_epoch():
    first, second = epochs(2, SPEECH)
    assert epochs(1, SPEECH) == [first]
    assert epochs(1, SPEECH, seed=2) != [first]
    groups = [{frozenset(i for _, i, _ in pack) for pack in packs} for packs in (first, second)]
    assert len(groups[0] & groups[1]) < 0.02 * len(groups[0])  # although one pool could hold all recordings


def test_packs_are_shuffled_by_length():
    """Sorted pools must not show in the order: lengths of neighbouring packs are independent."""
    (packs,) = epochs(1, SPEECH)
    shortest = np.array([pack[0][2] for pack in packs])
    assert abs(np.corrcoef(shortest[:-1], shortest[1:])[0, 1]) < 3 / np.sqrt(len(packs))


def test_little_is_lost():
    (packs,) = epochs(1, SPEECH)
    kept = sum(count for _, _, count in joined(packs)) / SPEECH.sum()
    filled = np.mean([len(pack) * pack[0][2] / BOUND for pack in packs])
    assert kept > 0.98
    assert filled > 0.85  # of whole recordings: a bound of 5.5 of them cannot be reached
    (padded,) = epochs(1, SPEECH, padded=True)
    waste = sum(len(pack) * max(count for _, _, count in pack) for pack in padded) / SPEECH.sum()
    assert waste < 1.02


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [4097, 4100, 8193])
def test_no_tiny_pool_or_pack_is_left_over(count, padded):
    """Equal lengths, ten to a pack: only the last two packs of a pool may be smaller."""
    (packs,) = epochs(1, [100] * count, bound=1000, padded=padded)
    sizes = Counter(map(len, packs))
    assert min(sizes) >= 5
    assert sum(n for size, n in sizes.items() if size < 10) <= 2 * 4


def test_a_recording_longer_than_the_bound_is_refused():
    with pytest.raises(ConfigError) as caught:
        PackSampler([5, 320_000], BatchPlan(1, 319_999, 1), 0, 1)
    assert "319,999" in str(caught.value) and "320,000" in str(caught.value) and "\n" not in str(caught.value)


def test_keys_are_plain_integers():
    assert {type(v) for pack in global_batches(PLANS[0], 1)[0] for key in pack for v in key} == {int}


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        PackSampler([], PLANS[0], 0, 1)


def test_crops_are_multiples_where_clips_are_long_enough():
    lengths = np.random.default_rng(3).integers(50, 2000, 300)
    plain, rounded = (
        list(islice(PackSampler(lengths, BatchPlan(1, 4000, 1), 0, 1, pool=64, multiple=m), 40)) for m in (1, 128)
    )
    for pack, other in zip(plain, rounded, strict=True):
        assert [key[:2] for key in pack] == [key[:2] for key in other]
        assert {key[2] for key in other} == {pack[0][2] // 128 * 128 or pack[0][2]}
