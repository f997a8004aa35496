"""The lower panels of the picture for speech: spectrograms."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from finetune.features import FrozenEncoder
from finetune.panels import HIDDEN, INK, LINE, MUTED, ROWS, Shown, explain_marks, hidden, mark, nearest, titled
from models.config import RATE
from pretrain.config import Config
from pretrain.labelled.mfcc import HOP, log_mel

Picture = NDArray[np.float64]  # (bands, columns of 10 ms, 3) in [0, 1]

CLIPS, MASKS_SHOWN, NEIGHBOURS = 3, 3, 4
SECONDS, FEW_SECONDS = 4.0, 2.5  # that are shown of a clip, in wide and in narrow places
PCA_CLIPS = 200
COLUMN = HOP / RATE  # seconds
LABEL = 8.5  # font size


def draw_task(axes: Axes, shown: Shown, config: Config, encoder: FrozenEncoder) -> None:
    """Clips and below each some of its masked views (of epoch 0)."""
    count, top, share = min(MASKS_SHOWN, config.model.num_masks), 0.0, 0.0
    for row in range(min(CLIPS, len(shown.query_ids))):
        sample = shown.query(row)
        picture, masks = spectrogram(sample.inputs), hidden(sample, config)
        _caption(axes, 0, top + 0.28, _name(shown, row, sample))
        top += 0.38
        _strip(axes, picture, 0, top, SECONDS)
        for m in range(count):
            top += 1.08
            greyed = picture.copy()
            greyed[:, masks[m][frame_of_column(config, picture.shape[1], len(masks[m]))]] = HIDDEN
            _strip(axes, greyed, 0, top, SECONDS)
        top += 1.3
        share = masks.mean()
    sub = f"{count} of {config.model.num_masks} views of each clip; the hidden {100 * share:.0f} % are to be predicted"
    _panel(axes, "The task", sub, SECONDS, CLIPS * (1.68 + 1.08 * MASKS_SHOWN) - 0.3)


def draw_alike(axes: Axes, shown: Shown, config: Config, encoder: FrozenEncoder) -> None:
    """Queries and their nearest gallery clips."""
    rows, step = min(ROWS, len(shown.query_ids)), 1.06 * FEW_SECONDS
    near = nearest(shown, encoder, rows, NEIGHBOURS)
    for row in range(rows):
        sample = shown.query(row)
        _caption(axes, 0, 1.4 * row + 0.25, _name(shown, row, sample))
        _strip(axes, spectrogram(sample.inputs), 0, 1.4 * row + 0.34, FEW_SECONDS)
        for column, i in enumerate(near[row]):
            x, found, same = (column + 1.12) * step, shown.found(i), shown.same(row, i)
            label = "" if shown.gallery_y is None else shown.classes[shown.gallery_y[i]]
            if same is not None:
                mark(axes, x + 0.045 * FEW_SECONDS, 1.4 * row + 0.15, same, 7)
            _caption(axes, x + (0.12 * FEW_SECONDS if same is not None else 0), 1.4 * row + 0.25, label or _time(found))
            _strip(axes, spectrogram(found.inputs), x, 1.4 * row + 0.34, FEW_SECONDS)
    sub = f"a {shown.kind} clip; nearest of {len(shown.gallery_ids):,} training clips"
    width = (near.shape[1] + 0.12) * step + FEW_SECONDS
    _panel(axes, "What the teacher finds alike", sub, width, 1.4 * ROWS)
    if shown.query_y is not None:
        explain_marks(axes)


def draw_parts(axes: Axes, shown: Shown, config: Config, encoder: FrozenEncoder) -> None:
    """The first three principal components of frames as red, green and blue, one scale for all clips."""
    clips = (shown.found(i) for i in range(min(PCA_CLIPS, len(shown.gallery_ids))))
    frames = np.concatenate([_frames(clip, encoder) for clip in clips])
    model = PCA(3, random_state=0).fit(frames)
    low, high = np.percentile(model.transform(frames), (2, 98), axis=0)
    for row in range(min(ROWS, len(shown.query_ids))):
        sample, top = shown.query(row), 1.4 * row + 0.34
        picture, own = spectrogram(sample.inputs), model.transform(_frames(sample, encoder))
        colours = ((own - low) / np.maximum(high - low, 1e-9)).clip(0, 1)
        colours = colours[frame_of_column(config, picture.shape[1], len(colours))][None]
        _caption(axes, 0, top - 0.09, _name(shown, row, sample))
        _strip(axes, picture, 0, top, SECONDS, 0.6)
        _strip(axes, colours, 0, top + 0.62, SECONDS, 0.36)
    share = 100 * model.explained_variance_ratio_.sum()
    sub = f"3 components ({share:.0f} % of variance) as RGB"
    _panel(axes, "What frames are made of", sub, SECONDS, 1.4 * ROWS)


def spectrogram(waveform: Any) -> Picture:
    """(samples,) -> log-mel, low bands at the bottom, dark to bright over the clip's own range."""
    bands = log_mel(waveform).T.flip(0).numpy()
    low, high = np.percentile(bands, (10, 99.5))
    return matplotlib.colormaps["magma"]((bands - low) / max(high - low, 1e-6))[..., :3]


def frame_of_column(config: Config, columns: int, frames: int) -> NDArray[np.int64]:
    """(columns,) which of the model's frames is where a column of the spectrogram is."""
    return np.minimum(np.arange(columns) * HOP // int(np.prod(config.model.audio.strides)), frames - 1)


def _frames(sample: Any, encoder: FrozenEncoder) -> NDArray[np.float32]:
    return encoder.features(sample.inputs[None]).positions[0].cpu().numpy()


def _time(sample: Any) -> str:
    return f"{len(sample.inputs) / RATE:.1f} s"


def _name(shown: Shown, row: int, sample: Any) -> str:
    return _time(sample) if shown.query_y is None else f"{shown.classes[shown.query_y[row]]}, {_time(sample)}"


def _strip(axes: Axes, picture: Picture, x: float, top: float, seconds: float, height: float = 1.0) -> None:
    """At most `seconds` of a picture, a second being 1 wide."""
    picture = picture[:, : round(seconds / COLUMN)]
    width = picture.shape[1] * COLUMN
    box = (x, x + width, top + height, top)
    axes.imshow(picture, extent=box, aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    axes.add_patch(Rectangle((x, top), width, height, fill=False, ec=LINE, lw=0.6))


def _caption(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, fontsize=LABEL, color=INK if text else MUTED, va="baseline", parse_math=False, clip_on=True)


def _panel(axes: Axes, title: str, sub: str, width: float, height: float) -> None:
    axes.set_xlim(0, 1.003 * width)
    axes.set_ylim(height, 0)
    axes.set_aspect("auto")
    axes.set_axis_off()
    titled(axes, title, sub)
