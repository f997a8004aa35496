"""The lower panels of the picture for images: tiles."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from finetune.features import FrozenEncoder
from finetune.panels import GREEN, HIDDEN, LINE, RED, ROWS, Shown, explain_marks, hidden, mark, nearest, titled
from pretrain.config import Config

Picture = NDArray[np.float64]  # (H, W, 3) in [0, 1]

NEIGHBOURS, MASKS_SHOWN = 6, 4
PCA_IMAGES = 500


def draw_task(axes: Axes, shown: Shown, config: Config, encoder: FrozenEncoder) -> None:
    """Each image and some of its masked views (of epoch 0)."""
    rows, patch = min(ROWS, len(shown.query_ids)), config.model.image.patch
    count, share = min(MASKS_SHOWN, config.model.num_masks), 0.0
    for row in range(rows):
        sample = shown.query(row)
        image, masks = as_pictures(sample.inputs[None])[0], hidden(sample, config)
        _tile(axes, image, 0, row)
        for m in range(count):
            greyed = image.copy()
            greyed[np.kron(masks[m], np.ones((patch, patch), bool))] = HIDDEN
            _tile(axes, greyed, 1.25 + m, row)
        share = masks.mean()
    sub = f"{count} of {config.model.num_masks} views of each image; the hidden {100 * share:.0f} % are to be predicted"
    _panel(axes, "The task", sub, 1.25 + count, rows)


def draw_alike(axes: Axes, shown: Shown, config: Config, encoder: FrozenEncoder) -> None:
    """Queries and their nearest gallery images."""
    rows = min(ROWS, len(shown.query_ids))
    near = nearest(shown, encoder, rows, NEIGHBOURS)
    for row in range(rows):
        _tile(axes, as_pictures(shown.query(row).inputs[None])[0], 0, row)
        for column, i in enumerate(near[row]):
            picture = as_pictures(shown.found(i).inputs[None])[0]
            _tile(axes, picture, 1.25 + column, row, shown.same(row, i))
    sub = f"a {shown.kind} image; nearest of {len(shown.gallery_ids):,} training images"
    _panel(axes, "What the teacher finds alike", sub, 1.25 + near.shape[1], rows)
    if shown.query_y is not None:
        explain_marks(axes)


def draw_parts(axes: Axes, shown: Shown, config: Config, encoder: FrozenEncoder) -> None:
    """The first three principal components of patch features as red, green and blue, one scale for all images."""
    fit = torch.stack([shown.found(i).inputs for i in range(min(PCA_IMAGES, len(shown.gallery_ids)))])
    patches = torch.cat([encoder.features(part).positions.cpu() for part in fit.split(64)]).numpy()
    mean = patches.mean(axis=0)  # of each position: what is left is what the image adds to its place
    model = PCA(3, random_state=0).fit((patches - mean).reshape(-1, patches.shape[-1]))
    low, high = np.percentile(model.transform((patches - mean).reshape(-1, patches.shape[-1])), (2, 98), axis=0)
    pixels = torch.stack([shown.query(row).inputs for row in range(len(shown.query_ids))])
    own = encoder.features(pixels).positions.cpu().numpy() - mean
    colours = (model.transform(own.reshape(-1, own.shape[-1])) - low) / np.maximum(high - low, 1e-9)
    colours = colours.clip(0, 1).reshape(len(pixels), *encoder.config.grid_shape, 3)
    for row, (image, colour) in enumerate(zip(as_pictures(pixels), colours, strict=True)):
        x, y = 2.3 * (row // ROWS), row % ROWS
        _tile(axes, image, x, y)
        _tile(axes, colour, x + 1, y)
    share = 100 * model.explained_variance_ratio_.sum()
    _panel(axes, "What patches are made of", f"3 components ({share:.0f} % of variance) as RGB", 4.3, ROWS)


def as_pictures(pixels: torch.Tensor) -> list[Picture]:
    """uint8 (B, C, H, W) -> B arrays (H, W, 3) in [0, 1]."""
    return list((pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).double() / 255).numpy())


def _tile(axes: Axes, image: Picture, x: float, row: int, same: bool | None = None) -> None:
    """One image in the unit square at column x; `same` puts a coloured frame and a mark on it."""
    gap = 0.04
    box = (x + gap, x + 1 - gap, row + 1 - gap, row + gap)
    axes.imshow(image, extent=box, interpolation="nearest", vmin=0, vmax=1)
    colour = LINE if same is None else GREEN if same else RED
    side = 1 - 2 * gap
    axes.add_patch(Rectangle((x + gap, row + gap), side, side, fill=False, ec=colour, lw=0.8 if same is None else 2.2))
    if same is not None:
        mark(axes, x + 0.86, row + 0.15, same)


def _panel(axes: Axes, title: str, sub: str, columns: float, rows: int) -> None:
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_aspect("equal", anchor="NW")
    axes.set_axis_off()
    titled(axes, title, sub)
