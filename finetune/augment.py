"""Augmentation of labelled images, a batch at a time on its device: RandAugment, random erasing, mixup and CutMix
(docs/method.md 4). Every choice is drawn there from torch's generator; nothing waits for the device.

kornia's RandAugment draws its operations once a batch, and its mixes and enhancements go through samples one by one; so
only what it does batched is taken from it. Pictures are Pillow's, as in the published recipe, but for bicubic
interpolation (torch's kernel has a = -0.75, Pillow's -0.5).
"""

from __future__ import annotations

import math

import torch
from kornia.filters import filter2d
from kornia.geometry.transform import remap
from torch import Tensor

from finetune.config import ImageTaskConfig

INVERT, AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, BRIGHTNESS, CONTRAST = range(8)  # pixel by pixel
COLOUR, SHARPNESS, ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, NOTHING = range(8, 16)
STRONGEST = 10  # the level at which operations do their utmost
LUMA = (19595, 38470, 7471)  # 2**16 of it, as Pillow counts
ATTEMPTS = 10  # at a rectangle that fits


def rand_augment(pixels: Tensor, config: ImageTaskConfig, fill: Tensor) -> Tensor:
    """`config.operations` operations one after the other on uint8 images (B, C, H, W). Each sample has its own: one of
    fifteen, half of the time, at a level of N(`magnitude`, `magnitude_std`) between 0 and STRONGEST, in either
    direction. What comes into the picture from outside is `fill` (C,)."""
    for _ in range(config.operations):
        chosen = _integers(NOTHING, len(pixels), pixels.device)
        chosen = torch.where(_happens(0.5, len(pixels), pixels.device), chosen, NOTHING)
        level = config.magnitude + config.magnitude_std * torch.randn(len(pixels), device=pixels.device)
        sign = torch.where(_happens(0.5, len(pixels), pixels.device), 1, -1)
        pixels = operate(pixels, chosen, level.clamp(0, STRONGEST) / STRONGEST, sign, fill)
    return pixels


def operate(pixels: Tensor, chosen: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    """Operation `chosen` (B,) on each image, as strong as `strength` (B,) from 0 to 1, in the direction of `sign`."""
    factor = (1 + 0.9 * sign * strength).clamp(min=0.1)
    grey = _grey(pixels)
    table = lookup_table(pixels, grey, chosen, strength, factor)
    looked_up = table.flatten(0, 1).gather(1, pixels.flatten(0, 1).flatten(1).long()).view_as(pixels)
    other = torch.where(_of(chosen == COLOUR), grey, _smooth(pixels))
    blended = blend(other, pixels, _of(factor))
    out = torch.where(_of((chosen == COLOUR) | (chosen == SHARPNESS)), blended, looked_up)
    return torch.where(_of((chosen >= ROTATE) & (chosen < NOTHING)), _warp(pixels, chosen, strength * sign, fill), out)


def lookup_table(pixels: Tensor, grey: Tensor, chosen: Tensor, strength: Tensor, factor: Tensor) -> Tensor:
    """(B, C, 256) uint8: what the operation makes of every value, itself where it is none of pixels one by one."""
    b, c = pixels.shape[:2]
    values = torch.arange(256, device=pixels.device)
    at = strength[:, None, None]
    kept = 4 - (at * 4).int()
    least = 256 - (at * 256).int().clamp(max=256)
    brighter = (values + (at * 110).int()).clamp(max=255)
    mean = (grey.flatten(1).float().mean(1) + 0.5).int()[:, None, None]
    of_values = {
        INVERT: 255 - values,
        POSTERIZE: values.bitwise_and(256 - torch.bitwise_left_shift(torch.ones_like(kept), 8 - kept)),
        SOLARIZE: torch.where(values < least, values, 255 - values),
        SOLARIZE_ADD: torch.where(values < 128, brighter, values),
        BRIGHTNESS: blend(torch.zeros_like(values), values, factor[:, None, None]),
        CONTRAST: blend(mean, values, factor[:, None, None]),
    }
    counts = torch.zeros(b, c, 256, dtype=torch.long, device=pixels.device)
    flat = pixels.flatten(2).long()
    counts.scatter_add_(2, flat, torch.ones((), dtype=torch.long, device=pixels.device).expand_as(flat))
    of_values |= {AUTOCONTRAST: _autocontrast(counts, values), EQUALIZE: _equalize(counts)}
    table = values.expand(b, c, -1)
    for operation, made in of_values.items():
        table = torch.where((chosen == operation)[:, None, None], made, table)
    return table.to(torch.uint8)


def _autocontrast(counts: Tensor, values: Tensor) -> Tensor:
    """Values spread over 0 to 255, channel by channel."""
    low = (counts > 0).int().argmax(2, keepdim=True)
    high = 255 - (counts > 0).int().flip(2).argmax(2, keepdim=True)
    width = (high - low).clamp(min=1).double()
    scale = torch.full_like(width, 255) / width  # what is truncated next shows any error, that of 255 / width, too
    spread = (values * scale - low * scale).int().clamp(0, 255)
    return torch.where(high > low, spread, values)


def _equalize(counts: Tensor) -> Tensor:
    """Values by their rank, channel by channel."""
    present = counts > 0
    last = 255 - present.int().flip(2).argmax(2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255
    below = counts.cumsum(2) - counts
    ranked = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    same = (present.sum(2, keepdim=True) <= 1) | (step == 0)
    return torch.where(same, torch.arange(256, device=counts.device), ranked)


def blend(low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
    """`low` at factor 0, `high` at 1, and beyond; in 0 to 255, truncated as Pillow does."""
    return (low.float() + factor * (high.float() - low.float())).clamp(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """(B, 1, H, W) uint8."""
    if pixels.shape[1] == 1:
        return pixels
    r, g, b = pixels.int().unbind(1)
    return ((r * LUMA[0] + g * LUMA[1] + b * LUMA[2] + 2**15) >> 16).to(torch.uint8)[:, None]


def _smooth(pixels: Tensor) -> Tensor:
    """A little blurred, but for the border."""
    kernel = torch.ones(1, 3, 3, device=pixels.device)
    kernel[:, 1, 1] = 5
    inner = filter2d(pixels.float(), kernel, padding="valid", normalized=True)
    out = pixels.clone()
    out[..., 1:-1, 1:-1] = (inner + 0.5).to(torch.uint8)
    return out


def _warp(pixels: Tensor, chosen: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Rotated by up to 30 degrees, sheared by up to 0.3 or shifted by up to 0.45 of the size; `amount` in [-1, 1]."""
    height, width = pixels.shape[2:]
    angle = torch.where(chosen == ROTATE, -amount * math.radians(30), 0)[:, None, None]
    cos, sin = angle.cos(), angle.sin()

    def only(operation: int, most: float) -> Tensor:
        return torch.where(chosen == operation, amount * most, 0)[:, None, None]

    y, x = torch.meshgrid(
        torch.arange(height, device=pixels.device) + 0.5, torch.arange(width, device=pixels.device) + 0.5, indexing="ij"
    )
    off_x, off_y = x - width / 2, y - height / 2
    # Where a pixel of the new picture is in the old one. Pillow shears from the corner and rotates about the middle.
    from_x = cos * off_x + sin * off_y + width / 2 + only(SHEAR_X, 0.3) * y + only(TRANSLATE_X, 0.45 * width)
    from_y = cos * off_y - sin * off_x + height / 2 + only(SHEAR_Y, 0.3) * x + only(TRANSLATE_Y, 0.45 * height)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    place = 2 * from_x / width - 1, 2 * from_y / height - 1  # as kornia would compute it by asking the host
    found = remap(pixels.float(), *place, "bicubic", "border", align_corners=False, normalized_coordinates=True)
    return torch.where(inside[:, None], (found + 0.5).clamp(0, 255), fill[:, None, None]).to(torch.uint8)


def erase(pixels: Tensor, config: ImageTaskConfig) -> Tensor:
    """Normalised images (B, C, H, W): in each with probability `erase` a rectangle, of 1/50 to 1/3 of the area and
    sides of a ratio of 0.3 to 1/0.3, is noise of N(0, 1)."""
    b, _, height, width = pixels.shape
    area, shape = torch.rand(2, b, ATTEMPTS, device=pixels.device)
    area = height * width * (0.02 + (1 / 3 - 0.02) * area)
    shape = (math.log(1 / 0.3) * (2 * shape - 1)).exp()
    h, w = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)
    top, left = torch.rand(2, b, 1, device=pixels.device)
    top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
    inside = _span(top, top + h, height)[:, :, None] & _span(left, left + w, width)[:, None]
    happens = _happens(config.erase, b, pixels.device) & fits.any(1)
    return torch.where((inside & happens[:, None, None])[:, None], torch.randn_like(pixels), pixels)


def mix(pixels: Tensor, shares: Tensor, config: ImageTaskConfig) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) and their shares of classes (B, K), with probability `mix_prob` mixed with those of the batch
    in reverse. With probability `switch_prob` by CutMix: a rectangle, whose share of the area is 1 - Beta(`cutmix`,
    `cutmix`) where it lies within, is the other's; else by mixup: Beta(`mixup`, `mixup`) of each pixel is its own. One
    draw a micro-batch."""
    height, width = pixels.shape[2:]
    switch_prob = config.switch_prob if config.mixup and config.cutmix else float(config.cutmix > 0)
    happens, cuts = _happens(config.mix_prob, 1, pixels.device), _happens(switch_prob, 1, pixels.device)
    own = torch.where(cuts, _beta(config.cutmix, pixels.device), _beta(config.mixup, pixels.device))
    side = (1 - own).sqrt()
    y, x = _integers(height, 1, pixels.device), _integers(width, 1, pixels.device)
    half_h, half_w = (side * height).int() // 2, (side * width).int() // 2
    inside = _span(y - half_h, y + half_h, height)[:, None] & _span(x - half_w, x + half_w, width)[None]
    weight = torch.where(cuts, (~inside).float(), own)
    weight = torch.where(happens, weight, 1.0)
    return torch.lerp(pixels.flip(0), pixels, weight), torch.lerp(shares.flip(0), shares, weight.mean())


def _beta(alpha: float, device: torch.device) -> Tensor:
    """(), of Beta(alpha, alpha); 1 for alpha 0."""
    if not alpha:
        return torch.ones((), device=device)
    both = torch.full((), alpha, device=device)
    return torch.distributions.Beta(both, both, validate_args=False).sample()


def _span(begin: Tensor, end: Tensor, size: int) -> Tensor:
    """(..., 1) -> (..., size) bool: which places lie in [begin, end)."""
    place = torch.arange(size, device=begin.device)
    return (place >= begin) & (place < end)


def _happens(probability: float, count: int, device: torch.device) -> Tensor:
    return torch.rand(count, device=device) < probability


def _integers(below: int, count: int, device: torch.device) -> Tensor:
    return torch.randint(below, (count,), device=device)


def _of(samples: Tensor) -> Tensor:
    return samples[:, None, None, None]
