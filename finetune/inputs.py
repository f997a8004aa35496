"""What features are taken of: folders and files of any modality, labelled or not, and samples that are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.config import RATE, ModelConfig
from pretrain.config import Config
from pretrain.data.documents import EMPTY, TextReader, find_text
from pretrain.data.fetch import resolve
from pretrain.data.names import digest
from pretrain.data.recordings import open_audio
from pretrain.data.sources import DataError, Sample, open_images
from pretrain.data.text import Sentences, open_sentences
from pretrain.data.tokenizer import Tokenizer
from pretrain.labelled.audio import shortest, whole_clips
from pretrain.labelled.image import centre_crops
from pretrain.labelled.samples import Labels
from pretrain.labelled.text import SentenceTexts


@dataclass(frozen=True)
class Source:
    """Samples, whole and not augmented, as a folder or file has them."""

    samples: Any  # pretrain.labelled.samples.Samples
    name: Callable[[int], str]
    fingerprint: str
    labels: Labels | None = None
    classes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """`name: reason` of what is none of the samples."""


def open_source(path: str, split: str, model: ModelConfig, tokenizer: Tokenizer | None) -> Source:
    """What lies at `path`: any images or recordings that pre-training reads; for text, `<split>.tsv`, a `.tsv` file, or
    `.txt` and `.jsonl` files, whose lines are the samples. Of what has splits, one.

    Raises DataError, in one line, if there is nothing.
    """
    return OPENERS[model.modality](resolve(path), split, model, tokenizer)


def _images(path: str, split: str, model: ModelConfig, tokenizer: Tokenizer | None) -> Source:
    source = open_images(path, split)
    images = centre_crops(source, Config(model=model))
    return Source(images, source.name, source.fingerprint(), source.labels, source.classes)


def _recordings(path: str, split: str, model: ModelConfig, tokenizer: Tokenizer | None) -> Source:
    source = open_audio(path, split)
    clips = whole_clips(source, Config(model=model))
    least = shortest(model)
    short = [f"{source.name(int(i))}: under {least / RATE:g} s" for i in np.flatnonzero(source.lengths < least)]
    return Source(clips, clips.name, source.fingerprint(), clips.labels, clips.classes, [*source.skipped, *short])


def _texts(path: str, split: str, model: ModelConfig, tokenizer: Tokenizer | None) -> Source:
    place = Path(path).expanduser()
    if place.is_file() and (stem := place.name.removesuffix(".gz")).endswith(".tsv"):
        place, split = place.parent, stem.removesuffix(".tsv")
    left_out: list[str] = []
    labels: Labels | None = None
    if any((place / f"{split}.tsv{packed}").is_file() for packed in ("", ".gz")):
        sentences = open_sentences(place, split)
        names = [f"{place / split}.tsv line {number}" for number in range(1, len(sentences) + 1)]
        labels = sentences.labels
    else:
        texts, names, left_out = _lines(place)
        sentences = Sentences(texts, np.zeros(len(texts), np.int64), [])
    found = digest(*(text.encode() for text in sentences.texts))
    samples = _sentences(sentences, model, tokenizer)
    return Source(samples, names.__getitem__, found, labels, sentences.classes, left_out)


def _lines(place: Path) -> tuple[list[str], list[str], list[str]]:
    """Texts, where each lies, and what was left out."""
    reader = TextReader(find_text([place]), "line")
    texts: list[str] = []
    names: list[str] = []
    parts: list[str] = []
    for piece in reader:
        parts.append(piece.text)
        if piece.last:
            if text := "".join(parts):
                texts.append(text)
                names.append(piece.where)
            else:
                reader.skip(EMPTY, piece.where)
            parts.clear()
    if not texts:
        raise DataError(f"{place} holds no text")
    return texts, names, [reader.summary()] if reader.skipped else []


OPENERS = {"image": _images, "audio": _recordings, "text": _texts}


def in_memory(samples: Sequence[Any], model: ModelConfig, tokenizer: Tokenizer | None) -> list[Sample]:
    """PIL images or uint8 arrays (H, W) or (H, W, C); waveforms at 16 kHz; or texts -> samples as training has them:
    centre crops; waveforms of mean 0 and variance 1, of the model's longest at most; ids.

    Raises DataError, in one line, for what is none of these.
    """
    if isinstance(samples, str) or not len(samples):
        raise DataError(f"samples should be a list of one or more, not {samples!r}")
    if model.modality == "text":
        for number, text in enumerate(samples):
            if not isinstance(text, str):
                raise DataError(f"text {number} is a {type(text).__name__}: give strings")
        dataset: Any = _sentences(Sentences(list(samples), np.zeros(len(samples), np.int64), []), model, tokenizer)
    elif model.modality == "audio":
        dataset = whole_clips(_Waveforms(samples, shortest(model)), Config(model=model))  # type: ignore[arg-type]
    else:
        dataset = centre_crops(_Pictures(samples), Config(model=model))
    found = [dataset[0, index] for index in range(len(samples))]
    for sample in found:
        if sample.failures:
            raise DataError(sample.failures[0])
    return found


class _Pictures:
    """Images in memory, as pretrain.data.sources.ImageSource."""

    labels: np.ndarray | None = None

    def __init__(self, images: Sequence[Any]) -> None:
        self.classes: list[str] = []
        self._images = [_picture(image, number) for number, image in enumerate(images)]

    def __len__(self) -> int:
        return len(self._images)

    def fingerprint(self) -> str:
        return ""

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> Image.Image:
        return self._images[index].copy()  # who reads closes it


def _picture(image: Any, number: int) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)):
        raise DataError(
            f"image {number} is {pixels.dtype} of shape {pixels.shape}: give PIL images or uint8 arrays (H, W) or "
            "(H, W, C) of 1, 3 or 4 channels"
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


class _Waveforms:
    """Waveforms in memory, as pretrain.data.recordings.AudioSource."""

    labels: np.ndarray | None = None

    def __init__(self, waveforms: Sequence[Any], least: int) -> None:
        self.classes: list[str] = []
        self.skipped: list[str] = []
        self._waves = [np.asarray(wave) for wave in waveforms]
        for number, wave in enumerate(self._waves):
            if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating) or len(wave) < least:
                raise DataError(
                    f"waveform {number} is {wave.dtype} of shape {wave.shape}: give floating-point samples (n,) at "
                    f"{RATE // 1000} kHz, one channel, at least {least}"
                )
        self.lengths = np.array([len(wave) for wave in self._waves], np.int64)

    def __len__(self) -> int:
        return len(self._waves)

    def fingerprint(self) -> str:
        return ""

    def name(self, index: int) -> str:
        return f"waveform {index}"

    def read(self, index: int, start: int, count: int) -> np.ndarray:
        return self._waves[index][start : start + count].astype(np.float32)


def _sentences(sentences: Sentences, model: ModelConfig, tokenizer: Tokenizer | None) -> SentenceTexts:
    if tokenizer is None:
        raise DataError("no tokenizer came with the weights, so that no text can be read; give ids")
    return SentenceTexts(sentences, tokenizer, model.text.tokens)
