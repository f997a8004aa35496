"""Batched augmentations against Pillow, closed forms and published statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from finetune import augment
from finetune.config import ImageTaskConfig

RNG = np.random.default_rng(0)
FILL = (124, 116, 104)


def pictures(channels: int, size: int = 24) -> list[Image.Image]:
    """Smooth, noisy, dark, flat and two-valued ones."""
    y, x = np.mgrid[:size, :size] / size
    smooth = np.stack([127 + 120 * np.sin(3 * x + c) * np.cos(2 * y) for c in range(channels)], 2)
    noisy = RNG.integers(0, 256, (size, size, channels))
    dark = RNG.integers(20, 90, (size, size, channels))
    flat = np.full((size, size, channels), 77)
    two = np.where(RNG.random((size, size, channels)) < 0.3, 10, 200)
    arrays = [a.astype(np.uint8) for a in (smooth, noisy, dark, flat, two)]
    return [Image.fromarray(a[..., 0] if channels == 1 else a) for a in arrays]


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    arrays = [np.asarray(image).reshape(*image.size[::-1], -1) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def ours(images: list[Image.Image], operation: int, strength: float, sign: int) -> torch.Tensor:
    pixels, b = as_tensor(images), len(images)
    fill = torch.tensor(FILL[: pixels.shape[1]], dtype=torch.float32)
    chosen, strengths = torch.full((b,), operation), torch.full((b,), strength)
    return augment.operate(pixels, chosen, strengths, torch.full((b,), sign), fill)


def factor(strength: float, sign: int) -> float:
    return max(0.1, 1 + sign * 0.9 * strength)


PILLOWS = {  # of (image, strength, sign), as the operations of 'rand-m9-mstd0.5-inc1' are described
    augment.INVERT: lambda i, s, _: ImageOps.invert(i),
    augment.AUTOCONTRAST: lambda i, s, _: ImageOps.autocontrast(i),
    augment.EQUALIZE: lambda i, s, _: ImageOps.equalize(i),
    augment.POSTERIZE: lambda i, s, _: i.point(lambda v: v >> (4 + int(4 * s)) << (4 + int(4 * s))),
    augment.SOLARIZE: lambda i, s, _: ImageOps.solarize(i, 256 - min(256, int(256 * s))),
    augment.SOLARIZE_ADD: lambda i, s, _: i.point(lambda v: min(255, v + int(110 * s)) if v < 128 else v),
    augment.BRIGHTNESS: lambda i, s, sign: ImageEnhance.Brightness(i).enhance(factor(s, sign)),
    augment.CONTRAST: lambda i, s, sign: ImageEnhance.Contrast(i).enhance(factor(s, sign)),
    augment.COLOUR: lambda i, s, sign: ImageEnhance.Color(i).enhance(factor(s, sign)),
    augment.SHARPNESS: lambda i, s, sign: ImageEnhance.Sharpness(i).enhance(factor(s, sign)),
    augment.NOTHING: lambda i, s, _: i,
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("strength", "sign"), [(0.9, 1), (0.9, -1), (0.5, 1), (1.0, -1), (0.0, 1)])
@pytest.mark.parametrize("operation", PILLOWS)
def test_operations_on_values_are_pillows(operation: int, channels: int, strength: float, sign: int) -> None:
    images = pictures(channels)
    expected = as_tensor([PILLOWS[operation](image, strength, sign) for image in images])
    difference = (ours(images, operation, strength, sign).int() - expected.int()).abs()
    # Blends of float32: a product that is a whole number up to rounding may fall on either side of it.
    blends = (augment.BRIGHTNESS, augment.CONTRAST, augment.COLOUR, augment.SHARPNESS)
    assert difference.max() <= (1 if operation in blends else 0)
    assert (difference > 0).float().mean() < 0.02


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    fill = FILL if image.mode == "RGB" else FILL[0]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


WARPS = {
    augment.ROTATE: lambda i, a: i.rotate(
        30 * a, Image.Resampling.BICUBIC, fillcolor=FILL if i.mode == "RGB" else FILL[0]
    ),
    augment.SHEAR_X: lambda i, a: affine(i, 1, 0.3 * a, 0, 0, 1, 0),
    augment.SHEAR_Y: lambda i, a: affine(i, 1, 0, 0, 0.3 * a, 1, 0),
    augment.TRANSLATE_X: lambda i, a: affine(i, 1, 0, 0.45 * a * i.size[0], 0, 1, 0),
    augment.TRANSLATE_Y: lambda i, a: affine(i, 1, 0, 0, 0, 1, 0.45 * a * i.size[1]),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("strength", "sign"), [(0.9, 1), (0.9, -1), (0.4, 1)])
@pytest.mark.parametrize("operation", WARPS)
def test_warps_are_pillows_but_for_the_kernel(operation: int, channels: int, strength: float, sign: int) -> None:
    image = pictures(channels, 40)[0]
    expected = as_tensor([WARPS[operation](image, strength * sign)])[0]
    found = ours([image], operation, strength, sign)[0]
    difference = (found.int() - expected.int()).abs()
    assert difference.float().mean() < 0.7
    assert (difference > 8).float().mean() < 0.01  # at the border, where Pillow rounds the coordinates


def test_each_sample_has_its_own_operation() -> None:
    images = pictures(3)
    pixels, fill = as_tensor(images), torch.tensor(FILL, dtype=torch.float32)
    chosen = torch.tensor([augment.ROTATE, augment.INVERT, augment.NOTHING, augment.COLOUR, augment.EQUALIZE])
    strength, sign = torch.full((5,), 0.9), torch.ones(5, dtype=torch.int)
    together = augment.operate(pixels, chosen, strength, sign, fill)
    for i in range(5):
        part = slice(i, i + 1)
        alone = augment.operate(pixels[part], chosen[part], strength[part], sign[part], fill)
        assert torch.equal(together[part], alone)
    assert torch.equal(together[2], pixels[2]) and not torch.equal(together[0], pixels[0])


def test_half_of_the_images_are_changed_by_one_operation_and_all_follow_the_seed() -> None:
    pixels = torch.randint(0, 256, (2000, 3, 8, 8), dtype=torch.uint8)
    config, fill = ImageTaskConfig(operations=1), torch.tensor(FILL, dtype=torch.float32)
    torch.manual_seed(3)
    once = augment.rand_augment(pixels, config, fill)
    torch.manual_seed(3)
    assert torch.equal(once, augment.rand_augment(pixels, config, fill))
    changed = (once != pixels).flatten(1).any(1).float().mean()
    # Half of them; noise of all values is left alone by autocontrast, mostly, and by an equalisation of 64 pixels.
    assert 0.5 - 2 / 30 - 0.04 < changed < 0.5 + 0.04
    torch.manual_seed(4)
    assert not torch.equal(once, augment.rand_augment(pixels, config, fill))


def test_rectangles_are_erased_as_often_and_as_large_as_said() -> None:
    pixels = torch.full((4000, 1, 32, 32), 9.0)
    torch.manual_seed(0)
    erased = augment.erase(pixels, ImageTaskConfig(erase=0.25)) != 9
    happened = erased.flatten(1).any(1)
    assert happened.float().mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    own = erased[happened, 0]
    share = own.flatten(1).float().mean(1)
    assert share.min() > 0.015 and share.max() < 1 / 3 + 0.03
    assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    for mask in own[:200]:  # whole rectangles, within the ratios
        h, w = int(mask.any(1).sum()), int(mask.any(0).sum())
        assert int(mask.sum()) == h * w
        assert 0.3 * 0.7 < h / w < 1 / (0.3 * 0.7)
    values = augment.erase(pixels, ImageTaskConfig(erase=1.0))
    noise = values[values != 9]
    assert noise.mean() == pytest.approx(0, abs=0.01) and noise.std() == pytest.approx(1, abs=0.01)
    rows = own.float().mean(0)
    assert rows[0, 0] < rows[16, 16]  # places are not all one corner
    assert rows[0, 0] > 0 and rows[-1, -1] > 0


def coloured(count: int = 4, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample i is all i and of class i."""
    pixels = torch.arange(count).float()[:, None, None, None].expand(-1, 3, size, size)
    return pixels, torch.eye(count)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.7, 0.0), (0.0, 1.0), (0.7, 1.0)])
def test_labels_are_shared_as_the_pixels_are(mixup: float, cutmix: float) -> None:
    pixels, labels = coloured()
    config, own, cut = ImageTaskConfig(mixup=mixup, cutmix=cutmix), [], 0
    for seed in range(400):
        torch.manual_seed(seed)
        mixed, shares = augment.mix(pixels, labels, config)
        assert torch.allclose(shares.sum(1), torch.ones(4))
        means = (shares * torch.arange(4.0)).sum(1)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), means, atol=1e-4, rtol=0)
        torch.testing.assert_close(shares, shares.flip(0, 1))
        own.append(float(shares[0, 0]))
        cut += len(mixed[0].unique()) == 2 or own[-1] in (0, 1)
    assert cut / 400 == pytest.approx(0 if not cutmix else 1 if not mixup else 0.5, abs=0.1)
    share = torch.tensor(own)
    if not cutmix:  # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
        assert share.mean() == pytest.approx(0.5, abs=0.06)
        assert share.var() == pytest.approx(1 / (4 * (2 * mixup + 1)), abs=0.02)
    elif not mixup:  # less is cut than 1 - Beta(1, 1), for boxes reach over the border
        assert 0.55 < share.mean() < 0.75


def test_mixing_happens_as_often_as_said() -> None:
    pixels, labels = coloured()
    config, same = ImageTaskConfig(mixup=0.7, cutmix=1.0, mix_prob=0.6), 0
    for seed in range(400):
        torch.manual_seed(seed)
        mixed, shares = augment.mix(pixels, labels, config)
        if torch.equal(shares, labels):
            assert torch.equal(mixed, pixels)
            same += 1
    assert same / 400 == pytest.approx(0.4, abs=0.1)
