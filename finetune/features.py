"""A checkpoint's encoder, frozen, without the engine that trained it; and the features that it gives a data set."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from models.config import ModelConfig
from models.data2vec import Encoder
from pretrain.checkpoint import CheckpointError, latest
from pretrain.config import Config, ConfigError, load
from pretrain.data.collate import Sample
from pretrain.data.image import ImageDataset
from pretrain.progress import Progress

Array = NDArray[np.float32]
Represent = Callable[[Tensor], Tensor]  # pixels (B, C, H, W) uint8 -> (B, D) float


class Features(NamedTuple):
    positions: Tensor  # (B, T, D) fp32, extra tokens dropped
    pooled: Tensor  # (B, D), their mean


CELLS = 2  # a side: probes see the means of the four quarters, for where things are in a picture is worth keeping


class FrozenEncoder:
    """An encoder in fp32 that no longer learns. Calling it gives what probes see: (B, CELLS**2 * D)."""

    def __init__(self, encoder: Encoder, config: ModelConfig, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = encoder.float().to(self.device).eval().requires_grad_(False)
        self.config = config

    @classmethod
    def untrained(cls, config: ModelConfig, seed: int) -> FrozenEncoder:
        """The same encoder before its first step: with a run's own seed, just what that run started from."""
        return cls(_fresh(config, seed), config)

    @torch.inference_mode()
    def features(self, pixels: Tensor, layer: int = -1) -> Features:
        """uint8 (B, C, H, W) -> features after main block `layer`, counted as Python counts.

        Raises IndexError if there is no such block.
        """
        last = range(self.config.depth)[layer]
        x, bias = self.encoder.context(self.encoder.local(pixels.to(self.device)))
        for output, _ in islice(self.encoder.layers(x, bias), last + 1):
            x = output
        positions = x[:, self.config.extra_tokens :]
        return Features(positions, positions.mean(dim=1))

    def __call__(self, pixels: Tensor) -> Tensor:
        positions = self.features(pixels).positions
        grid = positions.transpose(1, 2).unflatten(2, self.config.grid_shape)
        return F.adaptive_avg_pool2d(grid, CELLS).flatten(1)


@dataclass(frozen=True)
class Checkpoint:
    """One saved step of a run, whose folder may be all there is of it."""

    folder: Path

    @property
    def run(self) -> Path:
        """Where reports about it belong."""
        parent = self.folder.parent
        return parent.parent if parent.name == "checkpoints" else self.folder

    @property
    def step(self) -> int:
        return int(json.loads((self.folder / "state.json").read_text())["step"])

    @property
    def config(self) -> Config:
        return load(self.folder / "config.yaml")


def find(path: str | Path) -> Checkpoint:
    """The newest checkpoint of a run folder, or the one that `path` is.

    Raises ConfigError if it is neither, CheckpointError if the run has not saved yet.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; give a run folder or one of its checkpoints/step_*")
    if (path / "state.json").is_file() and (path / "config.yaml").is_file():
        return Checkpoint(path)
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    newest = latest(folder)
    if newest is not None and (newest / "state.json").is_file():
        return Checkpoint(newest)
    if folder.is_dir() or (path / "metrics.jsonl").is_file():
        raise CheckpointError(f"{path} holds no complete checkpoint yet; the run saves one every run.save_every steps")
    raise ConfigError(f"{path} is neither a run folder nor a checkpoint: no checkpoints/latest and no state.json in it")


def load_encoder(path: str | Path, which: str = "teacher") -> FrozenEncoder:
    """The teacher (fp32, put together from every rank's pieces) or the student of a run's newest or a given checkpoint.

    Raises ConfigError or CheckpointError, in one line, if it is not to be had.
    """
    if which not in WEIGHTS:
        raise ConfigError(f"which={which!r}: know {', '.join(WEIGHTS)}")
    found = find(path)
    config = found.config.model
    encoder = _fresh(config, seed=0)
    shapes = {name: parameter.shape for name, parameter in encoder.named_parameters()}
    state = WEIGHTS[which](found.folder, shapes)
    wrong = [name for name, shape in shapes.items() if name not in state or state[name].shape != shape]
    if wrong:
        raise CheckpointError(f"{found.folder}: the {which}'s weights do not fit its config.yaml, first {wrong[0]}")
    encoder.load_state_dict({name: state[name] for name in shapes})
    return FrozenEncoder(encoder, config)


def assemble_teacher(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The fp32 teacher from teacher_*.safetensors, each holding a rank's runs of consecutive elements.

    Raises CheckpointError for a file that cannot be read, and for parameters of which a part is missing.
    """
    pieces: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in shapes}
    for path in sorted(folder.glob("teacher_*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                starts = file.metadata() or {}
                for name in starts.keys() & shapes.keys():
                    pieces[name].append((int(starts[name]), file.get_tensor(name).view(-1)))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    whole = {}
    for name, parts in pieces.items():
        end = 0
        for start, part in sorted(parts, key=lambda p: p[0]):
            if start != end:
                break
            end += part.numel()
        if end != shapes[name].numel() or sum(part.numel() for _, part in parts) != end:
            raise CheckpointError(f"{folder}: {end} of {shapes[name].numel()} values of the teacher's {name} are there")
        whole[name] = torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])]).view(shapes[name])
    return whole


def student_weights(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The student as the forward pass saw it, so in low precision for bf16 and fp16 runs."""
    path = folder / "mp_rank_00_model_states.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: saved["module"][f"student.{name}"] for name in shapes}
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    except KeyError as error:
        raise CheckpointError(f"{path} has no weights {error}") from None


WEIGHTS = {"teacher": assemble_teacher, "student": student_weights}


def extract(
    represent: Represent,
    dataset: ImageDataset,
    batch_size: int = 256,
    label: str = "",
    indices: Sequence[int] | None = None,
) -> Array:
    """The features (n, D) of a data set, in its order. Say ImageDataset(train=False), or they are of random crops."""
    return extract_each([represent], dataset, batch_size, label, indices)[0]


def extract_each(
    represent: Sequence[Represent],
    dataset: ImageDataset,
    batch_size: int = 256,
    label: str = "",
    indices: Sequence[int] | None = None,
    workers: int = 0,
) -> list[Array]:
    """Several representations of the images `indices` (None: all), read once. -> one (n, D) each."""
    chosen = range(len(dataset)) if indices is None else indices
    keys = [(0, int(i)) for i in chosen]
    loader = DataLoader(dataset, batch_size, sampler=keys, collate_fn=stack_pixels, num_workers=workers)
    parts: list[list[Array]] = [[] for _ in represent]
    with Progress(label, len(keys)) as progress:
        for pixels in loader:
            for part, function in zip(parts, represent, strict=True):
                part.append(function(pixels).float().cpu().numpy())
            progress.advance(len(pixels))
    return [np.concatenate(part) for part in parts]


def stack_pixels(samples: Sequence[Sample]) -> Tensor:
    """-> (B, C, H, W) uint8."""
    return torch.stack([sample.inputs for sample in samples])


def _fresh(config: ModelConfig, seed: int) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(config)
