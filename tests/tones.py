"""Speech that is easy to tell: every letter is a tone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000
LETTERS = "abcd"
TEXTS = ("ab cd", "da", "c b a", "bad cab", "dd", "abba", "cad a", "b")


def tones(text: str, rng: np.random.Generator) -> np.ndarray:
    """0.1 s a letter and half of that between letters, in faint noise."""
    parts = []
    for letter in text:
        t = np.arange(int(0.1 * RATE)) / RATE
        sound = 0 * t if letter == " " else np.sin(2 * np.pi * 300 * 2 ** (1.1 * LETTERS.index(letter)) * t)
        parts += [0.3 * sound, np.zeros(int(0.05 * RATE))]
    wave = np.concatenate([np.zeros(800), *parts])
    return wave + rng.normal(0, 1e-3, len(wave))


def write_tones(folder: Path) -> Path:
    """TEXTS as train/i.wav with train/i.txt, and the same as test."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for i, text in enumerate(TEXTS):
            soundfile.write(folder / split / f"{i}.wav", tones(text, rng), RATE, subtype="FLOAT")
            (folder / split / f"{i}.txt").write_text(text.upper() + ".\n")
    return folder
