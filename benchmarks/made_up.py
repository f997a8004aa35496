"""Data for `benchmarks.loader` to read, as costly to decode as genuine data: photos, speech and a tokenised corpus."""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from pretrain.data.corpus import CorpusMeta

PHOTO = 500, 375
LARGE_PHOTO = 1600, 1200
ENCODINGS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
VOCABULARY = 50_265
_HARMONICS = 20


def write_jpegs(folder: Path, count: int, size: tuple[int, int] = PHOTO) -> None:
    """Class folders of JPEGs, smooth gradients under noise: at 500 x 375 about as large as ImageNet's."""
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_jpeg(i, size))


def write_tar(folder: Path, count: int) -> None:
    """One shard, each image beside its class."""
    with tarfile.open(folder / "shard-000.tar", "w") as tar:
        for i in range(count):
            for ending, content in (("jpg", _jpeg(i, PHOTO)), ("cls", b"0")):
                member = tarfile.TarInfo(f"{i:04}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_idx(folder: Path, count: int) -> None:
    """Grey images of 28 x 28, as of MNIST."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
    header = bytes((0, 0, 8, 3)) + np.array(pixels.shape, ">u4").tobytes()
    (folder / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())


def write_recordings(folder: Path, count: int, kind: str, rate: int, seconds: float = 30) -> None:
    """`count` recordings of a voice that rises and falls and pauses, under faint noise; one channel."""
    form, subtype = ENCODINGS[kind]
    for i in range(count):
        voice = _voice(i, rate, seconds)
        with soundfile.SoundFile(folder / f"{i:03}.{kind}", "w", rate, 1, subtype, format=form) as file:
            for start in range(0, len(voice), rate):  # some encoders keep all that they are given at once on the stack
                file.write(voice[start : start + rate])


def write_corpus(prefix: Path, tokens: int, document: int = 600) -> None:
    """A corpus in Megatron's indexed format of ids drawn at random, beside a file that passes for its tokenizer."""
    ids = np.random.default_rng(0).integers(4, VOCABULARY, tokens, np.uint16)
    starts = np.arange(0, tokens, document)
    lengths = np.diff(starts, append=tokens).astype("<i4")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(starts), len(starts) + 1)
    index = (lengths, (2 * starts).astype("<i8"), np.arange(len(starts) + 1, dtype="<i8"))
    prefix.with_suffix(".bin").write_bytes(ids.astype("<u2").tobytes())
    prefix.with_suffix(".idx").write_bytes(header + b"".join(part.tobytes() for part in index))
    tokenizer = prefix.with_suffix(".model")
    tokenizer.write_bytes(b"none")
    meta = CorpusMeta(
        tokenizer=tokenizer.name,
        fingerprint=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        vocabulary=VOCABULARY,
        bos=0,
        pad=1,
        eos=2,
        unk=3,
        documents=len(starts),
        tokens=tokens,
        largest_id=int(ids.max()),
        skipped={},
        sources=["made up"],
    )
    prefix.with_suffix(".json").write_text(json.dumps(asdict(meta)))


def _jpeg(number: int, size: tuple[int, int]) -> bytes:
    rng = np.random.default_rng(number)
    width, height = size
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
    noisy = smooth + rng.normal(0, 18, (height, width, 3))
    stream = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _voice(number: int, rate: int, seconds: float) -> NDArray[np.float32]:
    """Harmonics of a fundamental of 90 to 150 Hz in syllables of a third of a second."""
    rng = np.random.default_rng(number)
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * math.pi * np.cumsum(120 + 30 * np.sin(2 * math.pi * 0.7 * t)) / rate
    voiced = sum(np.sin(k * phase) / k for k in range(1, _HARMONICS))
    syllables = np.sin(2 * math.pi * 3 * t + rng.uniform(0, 6)).clip(0)
    return (0.15 * voiced * syllables + 0.01 * rng.standard_normal(len(t))).astype(np.float32)
