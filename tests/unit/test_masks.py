"""Block masks: exact counts, purity, and their distribution against 20,160 rows of the reference a preset.

Every statistic is a mean over independent rows, so that two programs are compared by z-scores whatever correlations
there are within a row. The bound makes a false alarm anywhere in this file less likely than one in 10,000.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import label
from scipy.stats import norm

from models.config import MaskConfig
from models.masks import draw_block_masks, row_keys

PUBLISHED = json.loads((Path(__file__).parent / "data" / "masks.json").read_text())
PRESETS = [name for name in PUBLISHED if name != "origin"]
STATISTICS = 2000  # that are compared in this file, rounded up
BOUND = norm.isf(1e-4 / (2 * STATISTICS))
COMMON = 300  # rarer run lengths and component sizes are taken together: a z-score wants a normal mean
FLAT = np.array([[[0] * 3] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0] * 3] * 3])  # four neighbours, within a row


def draw(config, shape, samples, num_masks=16, seed=1):
    return draw_block_masks(config, row_keys(seed, np.zeros(samples), np.arange(samples), num_masks), shape)


def visible(config, shape, rows):
    """(rows, height, width) of booleans; one axis has height 1."""
    masks = draw(config, tuple(shape), rows // 16)
    grid = np.zeros((rows, *shape[:-1], shape[-1]), bool)
    np.put_along_axis(grid.reshape(rows, -1), masks.ids_keep.numpy(), True, 1)
    return grid.reshape(rows, -1, shape[-1])


def run_counts(x):
    """(n, lines, length) -> (n, length + 1): how many maximal runs of each length every row has."""
    n, _, length = x.shape
    edges = np.diff(np.pad(x, ((0, 0), (0, 0), (1, 1))).astype(np.int8), axis=2)
    row, _, start = np.nonzero(edges == 1)
    end = np.nonzero(edges == -1)[2]
    return np.bincount(row * (length + 1) + end - start, minlength=n * (length + 1)).reshape(n, -1)


def component_counts(x):
    """(n, height, width) -> (n, cells + 1): how many 4-connected components of each size every row has."""
    n, cells = len(x), x[0].size
    labels, count = label(x, FLAT)
    row = np.zeros(count, int)
    row[labels[x] - 1] = np.nonzero(x)[0]
    size = np.bincount(labels[x], minlength=count + 1)[1:]
    return np.bincount(row * (cells + 1) + size, minlength=n * (cells + 1)).reshape(n, -1)


def histogram(counts, published, rows):
    """Columns of the common values and one of all others, ours a row and the published mean."""
    total = np.zeros(counts.shape[1])
    total[[int(k) for k in published]] = list(published.values())
    common = total >= COMMON
    ours, theirs = counts[:, common], total[common]
    if total[~common].sum() >= COMMON:
        ours = np.column_stack([ours, counts[:, ~common].sum(1)])
        theirs = np.append(theirs, total[~common].sum())
    return ours, theirs / rows


def compared(seen, entry):
    """(name, values a row (n, k), published means (k,)) of every statistic."""
    masked, n = ~seen, entry["rows"]
    yield "masked probability", masked.reshape(len(seen), -1), np.ravel(entry["masked_probability"])
    lines = {"kept across": seen, "kept down": seen.swapaxes(1, 2), "masked across": masked}
    for name, published in entry["runs"].items():
        yield f"runs {name}", *histogram(run_counts(lines[name]), published, n)
    share = masked.mean()
    centred = (masked - share) / np.sqrt(share * (1 - share))
    _, height, width = seen.shape
    for lag, published in entry["correlation"].items():
        dy, dx = map(int, lag.split(","))
        product = centred[:, : height - dy, : width - dx] * centred[:, dy:, dx:]
        yield f"correlation {lag}", product.mean((1, 2))[:, None], np.array([published])
    if "means" not in entry:
        return
    sizes = component_counts(seen)
    number = (sizes.sum(1)[:, None] == np.arange(sizes.shape[1])).astype(int)
    yield "component size", *histogram(sizes, entry["component_size"], n)
    yield "component count", *histogram(number, entry["component_count"], n)
    pairs = (seen[:, 1:] & seen[:, :-1]).sum((1, 2)) + (seen[:, :, 1:] & seen[:, :, :-1]).sum((1, 2))
    blocks = np.lib.stride_tricks.sliding_window_view(seen, (3, 3), (1, 2)).all((3, 4)).sum((1, 2))
    largest = sizes.shape[1] - 1 - (sizes[:, ::-1] > 0).argmax(1)
    for name, value in (("largest component", largest), ("adjacent pairs", pairs), ("full 3x3 blocks", blocks)):
        yield name, value[:, None], np.array([entry["means"][name]])


def scores(config, entry, rows):
    """The largest |z| of each statistic, and how many were looked at."""
    worst, looked_at = {}, 0
    for name, values, published in compared(visible(config, entry["shape"], rows), entry):
        error = values.std(0) * np.sqrt(1 / rows + 1 / entry["rows"]) + 1e-12
        worst[name] = np.abs((values.mean(0) - published) / error).max()
        looked_at += len(published)
    return worst, looked_at


@pytest.mark.parametrize("preset", PRESETS)
def test_distribution_is_that_of_the_reference(preset):
    entry = PUBLISHED[preset]
    worst, looked_at = scores(MaskConfig(**entry["mask"]), entry, entry["rows"])
    assert looked_at * len(PRESETS) <= STATISTICS
    assert {name: z for name, z in worst.items() if z > BOUND} == {}


WRONG = [(preset, wrong) for preset in PRESETS for wrong in ("length", "inverse", "adjust")]
WRONG.remove(("audio_base", "adjust"))  # its 50 frames get five blocks with and without


@pytest.mark.parametrize(("preset", "wrong"), WRONG)
def test_distribution_test_rejects_a_wrong_sampler(preset, wrong):
    entry = PUBLISHED[preset]
    right = MaskConfig(**entry["mask"])
    value = {"length": right.length - 1, "inverse": not right.inverse, "adjust": 0.0}[wrong]
    worst, _ = scores(dataclasses.replace(right, **{wrong: value}), entry, 4096)
    shape = [z for name, z in worst.items() if name.startswith(("runs", "correlation"))]
    assert max(shape) > 2 * BOUND


@pytest.mark.parametrize("preset", PRESETS)
def test_distribution_test_rejects_uniform_positions(preset):
    """Right counts and no blocks at all: every kind of statistic must see it, the marginal at the border included."""
    entry = PUBLISHED[preset]
    worst, _ = scores(dataclasses.replace(MaskConfig(**entry["mask"]), length=1, adjust=0.0), entry, 4096)
    kinds = {name.split()[0]: z for name, z in worst.items()}
    assert {kind: z for kind, z in kinds.items() if z < BOUND} == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_are_exact_and_ids_ascend(preset):
    entry = PUBLISHED[preset]
    config, positions = MaskConfig(**entry["mask"]), int(np.prod(entry["shape"]))
    keep, hide = (ids.numpy() for ids in draw(config, tuple(entry["shape"]), 64))
    assert keep.shape == (1024, entry["kept"])
    assert hide.shape == (1024, config.hidden(positions)) == (1024, positions - entry["kept"])
    assert (np.diff(keep) > 0).all() and (np.diff(hide) > 0).all()
    assert (np.sort(np.hstack([keep, hide])) == np.arange(positions)).all()


@pytest.mark.parametrize("positions", [499, 50, 7])
def test_one_axis_hides_exactly_the_floor(positions):
    config = MaskConfig(prob=0.5, adjust=0.05, length=5, inverse=False)
    keep, hide = (ids.numpy() for ids in draw(config, (positions,), 8))
    assert hide.shape[1] == int(positions * 0.5)
    assert (np.sort(np.hstack([keep, hide])) == np.arange(positions)).all()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_blocks_lie_right_on_a_grid_that_is_not_square(shape):
    """Just one block is drawn and nine cells are wanted: it must be 3x3, in rows and columns of this grid."""
    cells = shape[0] * shape[1]
    config = MaskConfig(prob=1 - 9.5 / cells, adjust=0.0)
    keep = draw(config, shape, 64).ids_keep.numpy()
    y, x = np.unravel_index(keep, shape)
    inside = (np.ptp(y, 1) == 2) & (np.ptp(x, 1) == 2)
    assert inside.mean() == pytest.approx((1 - 2 / shape[0]) * (1 - 2 / shape[1]), abs=0.06)  # unclamped centres


def test_a_mask_depends_on_seed_epoch_sample_and_number_only():
    """Alone, in any company and in any order."""
    config = MaskConfig()

    def masks(samples, epochs, num_masks=4):
        ids = draw_block_masks(config, row_keys(5, np.array(epochs), np.array(samples), num_masks), (14, 14)).ids_keep
        return ids.numpy().reshape(len(samples), num_masks, -1)

    together = masks([7, 1, 2**40, 7], [0, 3, 3, 1])
    assert (masks([2**40, 7, 7, 1], [3, 1, 0, 3]) == together[[2, 3, 0, 1]]).all()
    for i, (sample, epoch) in enumerate(zip([7, 1, 2**40, 7], [0, 3, 3, 1], strict=True)):
        assert (masks([sample], [epoch], 2)[0] == together[i, :2]).all()


def test_masks_differ_between_seeds_epochs_samples_and_numbers():
    samples, epochs = (grid.ravel() for grid in np.mgrid[0:20, 0:20])
    rows = [
        draw_block_masks(MaskConfig(), row_keys(seed, epochs, samples, 16), (14, 14)).ids_keep.numpy()
        for seed in range(3)
    ]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 3 * 20 * 20 * 16


def test_the_generator_is_pinned():
    """A change here changes the masks of every run: restarts of older runs would not repeat them."""
    keys = row_keys(1, np.array([0, 3]), np.array([0, 12345]), 2)
    two = draw_block_masks(MaskConfig(), keys, (14, 14))
    one = draw_block_masks(MaskConfig(0.5, 0.05, 5, False), keys, (499,))
    digest = hashlib.sha256(b"".join(ids.numpy().astype("<i8").tobytes() for ids in (*two, *one)))
    assert digest.hexdigest()[:16] == "84f75d217a102134"
