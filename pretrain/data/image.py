"""Images for pre-training: decoded from any source and read as random crops.

`ImageDataset` turns an image of a source into a square uint8 tensor. Every random choice is a pure function of (seed,
epoch, index), so a run gives the same pixels for any number of ranks and workers and after any restart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from pretrain.data.sources import DataError, ImageSource, Sample, read_or_replace

# Odd metadata is common in scraped images and says nothing about their pixels.
warnings.filterwarnings("ignore", module=r"PIL\.")

Box = tuple[float, float, float, float]

_CROP_STREAM = 0x63726F70

_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TRANSPOSE = {code: Image.Transpose[turn] for code, turn in enumerate(_TURNS.split(), start=2)}


@dataclass(eq=False)
class ImageDataset(torch.utils.data.Dataset):
    """Square crops of a source's images, asked for by (epoch, index).

    With `train`, a random resized crop (`crop_scale` of the area, aspect ratio log-uniform in `crop_ratio`)
    and a horizontal flip with probability `flip`; without, the square in the middle whose side is `centre` of the
    shorter one. A file that cannot be decoded, or is larger than `max_pixels`, is replaced by another one chosen
    by a hash of (seed, index, attempt). With `draft`, a JPEG is decoded at 1/2, 1/4 or 1/8 where the crop keeps `size`
    pixels each way: the same crop, sooner, of slightly other pixels (benchmarks/README.md says how much of either).
    """

    source: ImageSource
    _: KW_ONLY
    size: int
    seed: int
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    channels: int = 3
    max_pixels: int = 178_956_970
    draft: bool = True
    train: bool = True
    centre: float = 1.0
    notes: ClassVar[tuple[str, ...]] = ()
    assets: ClassVar[tuple[Path, ...]] = ()

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f"images have 1 channel (grey) or 3 (RGB), not {self.channels}")

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, index).

        Raises `IndexError` for an index outside the source and `DataError` after 16 undecodable files.
        """
        epoch, index = key
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")

        def read(chosen: int) -> torch.Tensor:
            rng = np.random.default_rng([_CROP_STREAM, self.seed, epoch, index])
            with _no_pillow_limit(), self.source.read(chosen) as image:
                return self._crop(image, rng)

        others = range(len(self))
        pixels, failures = read_or_replace(read, self.source.name, index, instead=others, seed=self.seed, kind="images")
        return Sample(pixels, epoch, index, failures)

    def _crop(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        mode = "L" if self.channels == 1 else "RGB"
        header_size = image.size
        if not isinstance(image, JpegImageFile):
            self._check_pixels(image, header_size)
            image.load()  # some formats know their orientation only now
        orientation = _orientation(image)
        upright_size = image.size[::-1] if orientation >= 5 else image.size
        mirrored = self.train and rng.random() < self.flip
        if self.train:
            box = _random_box(upright_size, self.crop_scale, self.crop_ratio, rng)
        else:
            side = self.centre * min(upright_size)
            box = _centre_box(upright_size, (side, side))
        box = _stored_box(box, image.size, orientation)
        if isinstance(image, JpegImageFile):
            box = _draft(image, box, self.size, mode) if self.draft else box
            self._check_pixels(image, header_size)
        # Cropping and orienting commute with the resize, and the small result is the cheap one to turn.
        size = (self.size, self.size)
        image = _eight_bit(image).resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image.convert(mode)))
        return pixels.reshape(self.size, self.size, -1).permute(2, 0, 1).contiguous()

    def _check_pixels(self, image: Image.Image, header_size: tuple[int, int]) -> None:
        if math.prod(image.size) > self.max_pixels:
            width, height = header_size
            raise DataError(f"{width}x{height} exceeds data.image.max_pixels={self.max_pixels}")


@contextmanager
def _no_pillow_limit() -> Iterator[None]:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken EXIF block may raise anything; the pixels are fine
        return 1
    return value if value in _TRANSPOSE else 1


def _random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    return _centre_box(size, (min(width, height * aspect), min(height, width / aspect)))


def _centre_box(size: tuple[int, int], inner: tuple[float, float]) -> Box:
    (width, height), (w, h) = size, inner
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _stored_box(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """The part of the stored image, of `size`, that shows as `box` once the orientation is applied."""
    left, top, right, bottom = box
    width, height = size
    if orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _draft(image: JpegImageFile, box: Box, size: int, mode: str) -> Box:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 if `box` keeps `size` pixels each way; return the box there."""
    width, height = image.size
    left, top, right, bottom = box
    least = math.ceil(width * size / (right - left)), math.ceil(height * size / (bottom - top))
    drafted = image.draft(mode, least)
    if drafted is None:
        return box
    scale = drafted[1][2] / width
    return left * scale, top * scale, right * scale, bottom * scale


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB: deep samples scaled, transparency laid over white."""
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        return Image.fromarray(_stretch(np.asarray(image, np.float64)))
    if image.has_transparency_data:
        front = image.convert("RGBA")
        back = Image.new("RGBA", image.size, "white")
        back.alpha_composite(front)
        return back.convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _stretch(values: np.ndarray) -> np.ndarray:
    """Finite values to 0..255 from their least to their greatest; not-a-number and a flat image become 0."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).round().astype(np.uint8)
