"""Log-mel spectrograms and mel-frequency cepstral coefficients, the features of speech before networks learned them.

25 ms Hann windows every 10 ms of 16 kHz waveforms; mel = 2595 log10(1 + Hz / 700).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from models.config import RATE

WINDOW, HOP, FFT = RATE // 40, RATE // 100, 512
EMPHASIS = 0.97
BANDS, LOWEST, HIGHEST = 40, 20.0, 8000.0
COEFFICIENTS = 20
REACH = 2  # frames to either side that a delta is fitted to
FLOOR = 1e-8  # of a band's energy: far below the noise of 16 bits


def mfcc_statistics(waveform: Tensor) -> Tensor:
    """(samples,) -> (4 * COEFFICIENTS,): mean over frames of the coefficients and of their deltas, then deviations."""
    coefficients = mfcc(waveform)
    each = torch.cat([coefficients, deltas(coefficients)], dim=1)
    return torch.cat([each.mean(dim=0), each.std(dim=0, correction=0)])


def mfcc(waveform: Tensor) -> Tensor:
    """(samples,) -> (frames, COEFFICIENTS)."""
    return log_mel(waveform) @ dct(BANDS)[:COEFFICIENTS].T


def log_mel(waveform: Tensor) -> Tensor:
    """(samples,) -> (frames, BANDS), natural logarithms; what is shorter than a window is filled up with zeros."""
    waveform = torch.nn.functional.pad(waveform.float(), (0, max(0, WINDOW - len(waveform))))
    emphasised = torch.cat([waveform[:1], waveform[1:] - EMPHASIS * waveform[:-1]])
    frames = emphasised.unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW, periodic=False)
    power = torch.fft.rfft(frames, FFT).abs().square()
    return (power @ mel_bands().T).clamp(min=FLOOR).log()


def deltas(x: Tensor) -> Tensor:
    """(frames, C) -> (frames, C), the slope a frame of the line fitted to 2 * REACH + 1 frames; ends are repeated."""
    last = len(x) - 1
    at = torch.arange(len(x))
    ahead = [n * (x[(at + n).clamp(max=last)] - x[(at - n).clamp(min=0)]) for n in range(1, REACH + 1)]
    return torch.stack(ahead).sum(dim=0) / (2 * sum(n * n for n in range(1, REACH + 1)))


@functools.cache
def mel_bands() -> Tensor:
    """(BANDS, FFT // 2 + 1) triangles of height 1 whose corners are equally far apart in mel."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (LOWEST, HIGHEST))
    corners = 700 * (10 ** (torch.linspace(low, high, BANDS + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.arange(FFT // 2 + 1, dtype=torch.float64) * RATE / FFT
    left, centre, right = (corners[i : BANDS + i, None] for i in range(3))
    rising, falling = (frequencies - left) / (centre - left), (right - frequencies) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()


@functools.cache
def dct(n: int) -> Tensor:
    """(n, n) the orthonormal DCT-II: row k gives coefficient k."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    matrix = math.sqrt(2 / n) * torch.cos(math.pi / n * (i + 0.5) * k)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
