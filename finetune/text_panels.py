"""The lower panels of the picture for text: sentences, and words."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from sklearn.preprocessing import normalize

from finetune.features import FrozenEncoder
from finetune.panels import HIDDEN, INK, MUTED, Shown, explain_marks, hidden, mark, nearest, titled
from pretrain.config import Config
from pretrain.data.tokenizer import Tokenizer
from pretrain.labelled.modality import MODALITIES
from pretrain.labelled.samples import like_sized

MONO, SANS = "DejaVu Sans Mono", "DejaVu Sans"
SIZE, ADVANCE, LINE_HEIGHT = 8.0, 0.602, 1.5  # points; width of a mono character and height of a line in SIZE
VIEWS, QUERIES, NEIGHBOURS = 3, 7, 3
SHORTEST, LONGEST = 10, 40  # tokens of sentences that the task is shown on
WORD_SENTENCES, OFTEN = 3000, 10  # that words are looked for in; how often one has to occur
WORDS, LIKE = 22, 4


def draw_task(axes: Axes, shown: Shown, config: Config, encoder: FrozenEncoder) -> None:
    """Sentences and some of their masked views (of epoch 0), hidden tokens as grey blocks."""
    chars, lines = _page(axes)
    tokenizer, top = shown.queries.tokenizer, 0.0
    count = min(VIEWS, config.model.num_masks)
    for row in range(len(shown.query_ids)):
        sample = shown.query(row)
        ids = sample.inputs.tolist()
        if not (SHORTEST <= len(ids) <= LONGEST and 0 < config.model.mask.hidden(len(ids)) < len(ids)):
            continue
        places = _wrapped(pieces(tokenizer, ids), chars)
        height = 1 + places[-1][1]
        if top + (count + 1) * (height + 0.35) > lines:
            continue
        masks = hidden(sample, config)
        for mask in [np.zeros(len(ids), bool), *masks[:count]]:
            for (x, y, piece), gone in zip(places, mask, strict=True):
                if gone:
                    axes.add_patch(Rectangle((x + 0.06, top + y + 0.1), len(piece) - 0.12, 0.8, fc=HIDDEN, ec="none"))
                else:
                    _write(axes, x, top + y + 0.5, piece, family=MONO, color=MUTED if piece in SPECIALS else INK)
            top += height + 0.35
        top += 0.65
    share = 100 * config.model.mask.hidden(config.model.positions) / config.model.positions
    sub = f"{count} of {config.model.num_masks} views of each; the hidden {share:.0f} % are to be predicted"
    titled(axes, "The task", sub)


def draw_alike(axes: Axes, shown: Shown, config: Config, encoder: FrozenEncoder) -> None:
    """Queries and their nearest gallery sentences."""
    rows = min(QUERIES, len(shown.query_ids))
    near = nearest(shown, encoder, rows, NEIGHBOURS)
    _, lines = _page(axes)
    step, width = lines / QUERIES, axes.get_xlim()[1]
    for row in range(rows):
        top = step * row
        label = "" if shown.query_y is None else f"   {shown.classes[shown.query_y[row]]}"
        room = width - 0.6 * len(label) * 1.05
        text = _cut(shown.query(row).text, room, "bold")
        _write(axes, 0, top + 0.5, text, fontweight="bold")
        if label:
            _write(axes, width, top + 0.5, label.strip(), color=MUTED, ha="right")
        for k, i in enumerate(near[row], start=1):
            y, same = top + 0.5 + k * (step - 0.9) / (NEIGHBOURS + 0.5), shown.same(row, i)
            if same is not None:
                mark(axes, 2.2, y, same, 6)
            _write(axes, 4, y, _cut(shown.found(i).text, width - 4))
    sub = f"a {shown.kind} sentence; nearest of {len(shown.gallery_ids):,} training sentences"
    titled(axes, "What the teacher finds alike", sub)
    if shown.query_y is not None:
        explain_marks(axes)


def draw_parts(axes: Axes, shown: Shown, config: Config, encoder: FrozenEncoder) -> None:
    """Words and those whose occurrences the teacher sees most alike, on average."""
    words, means = word_features(shown, encoder)
    _, lines = _page(axes)
    width = axes.get_xlim()[1]
    asked = [i for i, word in enumerate(words) if len(word) >= 4 and word.islower()]
    asked = [asked[i] for i in np.unique(np.linspace(0, len(asked) - 1, WORDS).astype(int))] if asked else []
    if asked:
        unit = normalize(means - means.mean(axis=0))
        cosine = unit[asked] @ unit.T
        cosine[np.arange(len(asked)), asked] = -2
        for row, (word, near) in enumerate(zip(asked, np.argsort(-cosine, axis=1)[:, :LIKE], strict=True)):
            y = (row + 0.5) * lines / WORDS
            _write(axes, 0, y, _cut(words[word], 0.28 * width, "bold"), fontweight="bold")
            _write(axes, 0.3 * width, y, _cut(", ".join(words[i] for i in near), 0.7 * width))
    else:
        _write(axes, 0, 0.5, f"no word occurs {OFTEN} times", color=MUTED)
    titled(axes, "Which words are alike", f"mean over occurrences; nearest of {len(words):,} words")


def word_features(shown: Shown, encoder: FrozenEncoder) -> tuple[list[str], NDArray[np.float32]]:
    """Words of the gallery that are one token each and occur OFTEN, the most frequent first, and the teacher's mean
    over their occurrences (words, D)."""
    modality, tokenizer = MODALITIES["text"], shown.gallery.tokenizer
    samples = [shown.found(i) for i in range(min(WORD_SENTENCES, len(shown.gallery_ids)))]
    counts: Counter[str] = Counter()
    sums: dict[str, torch.Tensor] = {}
    for batch in like_sized(np.array([len(s.inputs) for s in samples]), 64, modality.largest):
        inputs = modality.collate(encoder.config, [samples[i] for i in batch])
        positions = encoder.features(inputs.inputs, lengths=inputs.lengths).positions.cpu()
        for sample, found in zip(inputs.samples, positions, strict=True):
            for place, word in whole_words(pieces(tokenizer, sample.inputs.tolist())):
                counts[word] += 1
                sums[word] = sums[word] + found[place] if word in sums else found[place]
    words = [word for word, count in counts.most_common() if count >= OFTEN]
    means = [(sums[word] / counts[word]).numpy() for word in words]
    return words, np.stack(means) if means else np.zeros((0, encoder.config.width), np.float32)


def whole_words(parts: Sequence[str]) -> list[tuple[int, str]]:
    """(place, word) of the pieces that are a word of letters each, with no part of it in the piece before or behind."""
    found = []
    for i, part in enumerate(parts):
        before = parts[i - 1] if i else ""
        after = parts[i + 1] if i + 1 < len(parts) else ""
        begins = part.startswith(" ") or not before or before in SPECIALS or before[-1:].isspace()
        ends = after in SPECIALS or not (after[:1].isalnum() or after[:1] in ("'", "-"))
        if begins and ends and part.strip().isalpha():
            found.append((i, part.strip()))
    return found


SPECIALS = ("<s>", "</s>", "<pad>")


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each id adds to those before it, with its spaces; special ones by name."""
    names = dict(zip((tokenizer.bos, tokenizer.eos, tokenizer.pad), SPECIALS, strict=True))
    parts, whole, begin = [], "", 0
    for i, number in enumerate(ids):
        if number in names:
            parts.append(names[number])
            whole, begin = "", i + 1
            continue
        longer = tokenizer.decode(ids[begin : i + 1])
        parts.append(longer[len(whole) :] if longer.startswith(whole) else tokenizer.decode([number]))
        whole = longer
    return parts


def _wrapped(parts: Sequence[str], chars: int) -> list[tuple[int, int, str]]:
    """(column, line, text) of pieces in lines of `chars` characters."""
    places, column, line = [], 0, 0
    for before, part in zip(["", *parts], parts, strict=False):
        space = part.startswith(" ") or part in SPECIALS or before in SPECIALS
        text = drawable(part.strip(), MONO)[:chars] or "\N{MIDDLE DOT}"
        start = column + (space and column > 0)
        if start + len(text) > chars:
            start, line = 0, line + 1
        places.append((start, line, text))
        column = start + len(text)
    return places


def _page(axes: Axes) -> tuple[int, int]:
    """Makes columns of mono characters and lines of text the units of the axes; how many there are."""
    box = axes.get_window_extent()
    points = 72 / axes.figure.dpi  # of a pixel
    chars, lines = int(box.width * points / (SIZE * ADVANCE)), int(box.height * points / (SIZE * LINE_HEIGHT))
    axes.set_xlim(0, box.width * points / (SIZE * ADVANCE))
    axes.set_ylim(lines, 0)
    axes.set_axis_off()
    return chars, lines


def _write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    usual: dict[str, Any] = {"fontsize": SIZE, "va": "center_baseline", "parse_math": False, "color": INK}
    axes.text(x, y, text, **usual | style)


def _cut(text: str, room: float, weight: str = "normal") -> str:
    """As many words of a text as fit into the width of `room` mono characters."""
    text = drawable(" ".join(text.split()), SANS)
    font = get_font(findfont(FontProperties(family=SANS, weight=weight)))
    font.set_size(16 * SIZE, 72)  # so large that nothing is rounded

    def fits(candidate: str) -> bool:
        font.set_text(candidate, 0.0)
        return font.get_width_height()[0] / (64 * 16) <= room * SIZE * ADVANCE

    if fits(text):
        return text
    words = text.split(" ")
    while len(words) > 1 and not fits(" ".join(words) + " …"):
        words.pop()
    return " ".join(words) + " …"


def drawable(text: str, family: str) -> str:
    """The text without what the font has no glyphs for."""
    return "".join(c for c in text if ord(c) in _glyphs(family))


@functools.cache
def _glyphs(family: str) -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=family))).get_charmap())
