"""Drawing masks (NumPy, in the loader), and moving rows of positions in and out (torch, on the device).

A mask is a pure function of (seed, epoch, sample, mask number): random numbers come from a counter-based generator
keyed by those four, so that neither workers, ranks nor restarts can change it, and a batch is drawn at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.config import MaskConfig
from models.fused import kernels

U64 = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Masks(NamedTuple):
    """Row b*M + m is mask m of sample b; both index arrays ascend within a row."""

    ids_keep: Tensor  # (B*M, K) int64, positions the student sees
    ids_mask: Tensor  # (B*M, T-K) int64, positions it has to predict


def hash_u64(x: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): a bijection that mixes all 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_keys(seed: int, epochs: NDArray, samples: NDArray) -> U64:
    """(B,) one 64-bit key a sample, from seed, epoch (B,) and sample (B,)."""
    key = hash_u64(np.full(1, seed, np.uint64) + _GOLDEN)
    for part in (np.asarray(epochs), np.asarray(samples)):
        key = hash_u64(key + _GOLDEN * (part.astype(np.uint64) + np.uint64(1)))
    return key


def row_keys(seed: int, epochs: NDArray, samples: NDArray, num_masks: int) -> U64:
    """(B*M,) one 64-bit key a row, from seed, epoch (B,), sample (B,) and mask number."""
    key = sample_keys(seed, epochs, samples)
    number = np.arange(1, num_masks + 1, dtype=np.uint64)
    return hash_u64(key[:, None] + _GOLDEN * number).reshape(-1)


def random_words(keys: U64, count: int) -> U64:
    """(R, count) independent uniform 64-bit words, SplitMix64 streams started at the row keys."""
    return hash_u64(keys[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def uniform(words: U64) -> NDArray[np.float64]:
    """Words as numbers in [0, 1)."""
    return np.multiply(words >> np.uint64(11), 2.0**-53, dtype=np.float64)


def below(words: U64, bound: int) -> NDArray[np.int64]:
    """Words as whole numbers in [0, bound), which is at most 2^32."""
    return ((words >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


def draw_block_masks(config: MaskConfig, keys: U64, shape: tuple[int, ...]) -> Masks:
    """Block masks for R rows over a grid of one or two axes (docs/method.md 3).

    Block centres are drawn with replacement, blocks are clamped at the border, and single random positions are then
    added or removed until the count is exact. That last step needs no loop: with one random priority a position, the
    wanted set is the `count` highest of (in a block, priority).
    """
    positions = math.prod(shape)
    chosen = positions - config.hidden(positions) if config.inverse else config.hidden(positions)
    share = 1 - config.prob if config.inverse else config.prob
    blocks = 0  # blocks of single positions would only repeat what the last step does
    if config.length > 1:
        blocks = int(positions * (share + config.adjust) / config.length ** len(shape))
    words = random_words(keys, blocks + positions)

    centre = below(words[:, :blocks], positions)
    offset = np.arange(config.length) - config.length // 2
    cells = np.zeros((len(keys), blocks, 1), np.int64)
    for axis, (at, size) in enumerate(zip(np.unravel_index(centre, shape), shape, strict=True), 1):
        line = np.clip(at[..., None] + offset, 0, size - 1)
        cells = (cells[..., :, None] * size + line[..., None, :]).reshape(len(keys), blocks, config.length**axis)

    priority = words[:, blocks:] >> np.uint64(1)
    rows = np.arange(len(keys))[:, None, None]
    priority[rows, cells] |= np.uint64(1 << 63)
    threshold = np.partition(priority, positions - chosen, axis=1)[:, positions - chosen]
    picked = priority >= threshold[:, None]
    visible = picked if config.inverse else ~picked
    return Masks(_ids(visible), _ids(~visible))


def _ids(chosen: NDArray[np.bool_]) -> Tensor:
    """(R, T) with equal counts a row -> (R, count) ascending positions."""
    return torch.from_numpy(np.nonzero(chosen)[1].reshape(len(chosen), -1))


def draw_spans(
    keys: U64, lengths: NDArray[np.int64], size: int, prob: float, length: int, least: int = 0
) -> NDArray[np.bool_]:
    """(R, size) for R rows, of which the first `lengths` (R,) positions can be covered: spans of `length` begin at
    distinct random places, as many as would cover the share `prob` of a row if none overlapped (Baevski et al. 2020,
    wav2vec 2.0, 3.1 and B; rounded up or down at random, and `least` at any rate where they fit)."""
    words = random_words(keys, 1 + size)
    places = np.maximum(lengths - length + 1, 0)
    count = (prob * lengths / length + uniform(words[:, 0])).astype(np.int64)
    count = np.minimum(np.maximum(count, least), places)
    rank = np.where(np.arange(size) < places[:, None], words[:, 1:] >> np.uint64(1), np.iinfo(np.int64).max)
    starts = np.zeros((len(keys), size + length), np.int64)
    starts[:, :size] = rank.argsort(1).argsort(1) < count[:, None]
    covered = starts.cumsum(1)
    covered[:, length:] -= covered[:, :-length].copy()
    return covered[:, :size] > 0


def gather_rows(x: Tensor, ids: Tensor | None) -> Tensor:
    """(B, T, D) and ids (B*M, K) -> (B*M, K, D): row b*M+m takes its positions from sample b, without M copies of x.

    Without ids, x itself. Those of a row are distinct.
    """
    if ids is None:
        return x
    if kernels.triton("rows", x):
        from models.fused.rows import Gather

        return Gather.apply(x, ids)
    b, _, d = x.shape
    flat = ids.reshape(b, -1)
    return x.gather(1, flat[..., None].expand(-1, -1, d)).view(*ids.shape, d)


def scatter_rows(
    kept: Tensor, ids_keep: Tensor, length: int, noise_std: float = 0.0, seeds: Sequence[int] = ()
) -> Tensor:
    """(N, K, D) put back at their places among `length`; Gaussian noise, or zero, everywhere else. -> (N, T, D).

    The noise of a sample's M rows comes from its own seed, so that it does not depend on how samples are batched. The
    kernel draws other numbers from a seed than torch's generators, as these do on unlike devices.
    """
    if kernels.triton("rows", kept):
        from models.fused.rows import scatter

        return scatter(kept, ids_keep, length, noise_std, seeds)
    n, _, d = kept.shape
    full = kept.new_zeros(n, length, d)
    if noise_std:
        generator = torch.Generator(kept.device)
        for rows, seed in zip(full.chunk(len(seeds)), seeds, strict=True):
            rows.normal_(std=noise_std, generator=generator.manual_seed(seed))
    return full.scatter_(1, ids_keep[..., None].expand(-1, -1, d), kept)


def real_positions(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, T, 1), in x's type: 1 where positions of x (B, T, D) lie before the sample's end, `lengths` (B,); else 0."""
    if lengths is None:
        return x.new_ones(len(x), x.shape[1], 1)
    return (torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None])[..., None].to(x.dtype)


def without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, T, D), zero behind each sample's end; itself if nothing is padded."""
    return x if lengths is None else x * real_positions(x, lengths)
